"""Every switch of how a policy is computed arrives where Megatron-core reads it; what it does there is tested elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.check import check_config
from megatron_dppo.training.config.load import load_config
from megatron_dppo.training.config.optimizer_memory import OptimizerMemoryConfig
from megatron_dppo.training.config.recompute import RecomputeConfig
from megatron_dppo.training.config.schema import AdamConfig, ModelConfig
from megatron_dppo.training.policy import trainable
from tests.models.tiny_policies import tiny_hf_config
from tests.rank_pool import RankPools
from tests.training.tiny_runs import QUICKSTART


def _built(model: ModelConfig, parallel: ParallelConfig) -> list[Any]:
    """(TransformerConfig, DistributedDataParallelConfig, OptimizerConfig) of a policy, each as its fields."""
    initialize_model_parallel(parallel, seed=3)
    hf_config = tiny_hf_config("qwen3_moe", num_hidden_layers=4)
    chunks = trainable.build_chunks(model, parallel, hf_config, torch.device("cpu"))
    policy = trainable.wrap_for_training(chunks, hf_config, torch.float32, parallel)
    state = trainable.build_optimizer(policy, AdamConfig(), 1)
    config = policy.transformer_config
    no_sync = config.no_sync_func is not None
    fields = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
    others = ("deallocate_pipeline_outputs", "batch_p2p_sync", "apply_rope_fusion", "moe_permute_fusion")
    of_model = {name: getattr(config, name) for name in (*fields, *others)}
    optimizer = getattr(state.optimizer, "chained_optimizers", [state.optimizer])[0].config
    return [of_model, vars(policy.chunks[0].ddp_config), vars(optimizer), no_sync]


def test_defaults_switch_nothing_on(ranks: RankPools) -> None:
    ((model, reduction, optimizer, no_sync),) = ranks(1).run(_built, ModelConfig(), ParallelConfig())
    assert model["recompute_granularity"] is None
    assert not model["apply_rope_fusion"]
    assert not reduction["overlap_grad_reduce"]
    assert not reduction["overlap_param_gather"]
    assert not optimizer["use_precision_aware_optimizer"]
    assert not optimizer["optimizer_cpu_offload"]
    assert not no_sync


def test_switches_arrive(ranks: RankPools) -> None:
    model = ModelConfig(
        recompute=RecomputeConfig("full", "block", 3),
        overrides={"deallocate_pipeline_outputs": True, "batch_p2p_sync": False, "apply_rope_fusion": False},
    )
    parallel = ParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=1234
    )
    ((built, reduction, optimizer, no_sync),) = ranks(1).run(_built, model, parallel)
    assert (built["recompute_granularity"], built["recompute_method"], built["recompute_num_layers"]) == (
        "full",
        "block",
        3,
    )
    assert built["deallocate_pipeline_outputs"]
    assert not built["batch_p2p_sync"]
    assert reduction["overlap_grad_reduce"]
    assert reduction["overlap_param_gather"]
    assert reduction["bucket_size"] == 1234
    assert optimizer["overlap_param_gather"]
    assert no_sync
    selective = ModelConfig(recompute=RecomputeConfig("selective", modules=["moe"]))
    ((built, *_),) = ranks(1).run(_built, selective, ParallelConfig())
    assert (built["recompute_granularity"], built["recompute_modules"]) == ("selective", ["moe"])


def test_how_the_optimizer_keeps_its_state_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to core's own optimizer, which needs a GPU and Transformer Engine (one without: test_offloaded_optimizer.py)."""
    asked: dict[str, Any] = {}

    class _AskedError(Exception):
        pass

    def optimizer_config(**fields: Any) -> OptimizerConfig:
        asked.update(fields)
        raise _AskedError

    monkeypatch.setattr(trainable, "OptimizerConfig", optimizer_config)
    policy: Any = type("Policy", (), {"dtype": torch.bfloat16, "uses_distributed_optimizer": True})()
    policy.chunks = [type("Chunk", (), {"ddp_config": type("DDP", (), {"overlap_param_gather": False})})]
    for memory in (OptimizerMemoryConfig("bf16", "bf16"), OptimizerMemoryConfig(offload_fraction=0.5)):
        with pytest.raises(_AskedError):
            trainable.build_optimizer(policy, AdamConfig(), 1, memory)
        assert memory.optimizer_fields().items() <= asked.items()
        asked.clear()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.backend=te"], "model.backend=te needs Transformer Engine: its kernels do not run on a cpu"),
        (["model.backend=fast"], "model.backend must be one of auto, te, local"),
        (["model.recompute_activations=true"], "write model.recompute.granularity=full"),
        (
            ["model.recompute.granularity=selective", "model.recompute.modules=[layernorm]"],
            "layernorm can be recomputed in",
        ),
        (["model.recompute.granularity=full", "model.recompute.num_layers=9"], "num_layers=9 must be from 1 to 4"),
        (["model.recompute.num_layers=0"], "model.recompute.num_layers must be at least 1"),
        (["model.overrides.fp8=e4m3"], "model.overrides.fp8 cannot be set"),
        (["model.overrides.attention_backend=flash"], "read by Transformer Engine's layers only"),
        (["train.optimizer_memory.first_moment=bf16"], "first_moment needs GPUs"),
        (["parallel.moe_token_dispatcher=flex", "parallel.expert_model_parallel_size=2"], "flex needs DeepEP"),
        (["parallel.overlap_param_gather=true"], "set use_distributed_optimizer and overlap_grad_reduce too"),
    ],
)
def test_a_switch_that_cannot_be_had_is_one_error_before_anything_is_built(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(load_config(QUICKSTART, overrides), tiny_hf_config("qwen3_moe", num_hidden_layers=4), 2)


def test_a_configuration_for_gpus_can_be_checked_where_there_are_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("here it is asked what is installed")
    overrides = [
        "run.device=cuda", "model.backend=te", "model.dtype=bf16", "model.overrides.attention_backend=flash",
        "model.recompute.granularity=selective", "model.recompute.modules=[layernorm,moe_act]",
        "parallel.use_distributed_optimizer=true", "train.optimizer_memory.offload_fraction=1",
        "parallel.moe_token_dispatcher=flex", "parallel.expert_model_parallel_size=2",
    ]  # fmt: skip
    check_config(load_config(QUICKSTART, overrides), tiny_hf_config("qwen3_moe", num_hidden_layers=4), 2)
