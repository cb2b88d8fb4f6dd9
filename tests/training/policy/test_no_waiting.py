"""An optimizer step queues all of its work before the host looks at the device: once, to see whether the step may be applied.

Nothing in this package waits before that. What Megatron-core itself waits for is listed: anything new is looked at.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from megatron_dppo import DPPOConfig
from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.training.config.schema import AdamConfig, AlgorithmConfig, Config, TrainConfig
from megatron_dppo.training.policy import optimizer_step
from megatron_dppo.training.policy.dppo_step import DPPOStep
from megatron_dppo.training.policy.trainable import build_optimizer, wrap_for_training
from tests.device_waits import DeviceWaits
from tests.example_sequences import examples, replica_batch
from tests.models.tiny_policies import tiny_hf_config
from tests.rank_pool import RankPools


def _waits(
    policy_kind: str, layout: dict[str, Any], train: dict[str, Any], loss: dict[str, Any]
) -> list[tuple[str, str]]:
    """What waits between the first micro-batch's way to the device and the look before the optimizer's step."""
    parallel = ParallelConfig(**layout)
    initialize_model_parallel(parallel, seed=3)
    hf_config = tiny_hf_config(policy_kind)
    chunks = build_policy(hf_config, parallel, torch.float32)
    initialize_randomly(chunks, seed=3)
    policy = wrap_for_training(chunks, hf_config, torch.float32)
    config = Config(
        parallel=parallel,
        algorithm=AlgorithmConfig(loss=DPPOConfig(**loss)),
        train=TrainConfig(updates_per_rollout=1, micro_batch_size=2, tokens_per_micro_batch=40, **train),
    )
    step = DPPOStep(config, policy, build_optimizer(policy, AdamConfig(), total_steps=1))
    found: list[tuple[str, str]] = []
    run_schedule = optimizer_step._run_schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        with DeviceWaits() as waits:
            result = run_schedule(*args, **kwargs)
        assert waits.operators > 100  # the watch saw the whole schedule
        found.extend(waits.found)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_step, "_run_schedule", watched)
        step.run(replica_batch(step, examples(), 1))
    return found


_PACKAGES = re.compile(r".*/(megatron/core|megatron_dppo)/")
# core's file and function -> what it asks the device
MEGATRON_WAITS = {
    "distributed/finalize_model_grads.py:finalize_model_grads": "whether there are any tokens, after the last backward",
    "models/common/embeddings/rope_utils.py:_apply_rotary_pos_emb_thd": "packed: bounds, which lie on the host there",
    "tensor_parallel/layers.py:forward": "TP: which ids of the embedding are another rank's (a boolean index)",
    "tensor_parallel/random.py:fork": "TP, CPU only: the random state",
    "transformer/moe/experts.py:forward": "MoE: how many tokens each expert gets",
    "transformer/moe/moe_utils.py:permute": "MoE: which tokens each expert gets (a boolean index)",
    "transformer/moe/moe_utils.py:sort_chunks_by_idxs": "MoE: how many tokens come from each rank",
    # What stands in for core's token_dispatcher.maybe_move_tensor_to_cpu on CPU ranks.
    "compat/megatron_on_cpu.py:move_to_cpu": "MoE: how many tokens go to each rank",
    "pipeline_parallel/schedules.py:backward_step": "MoE: the backward of that",
}


def _unlisted(found: list[tuple[str, str]]) -> set[tuple[str, str]]:
    return {(name, caller) for name, caller in found if _PACKAGES.sub("", caller) not in MEGATRON_WAITS}


@pytest.mark.parametrize(
    ("policy_kind", "train", "loss"),
    [
        ("qwen3", {}, {"divergence": "topk_kl", "direction": "predictive"}),
        ("qwen3", {"fused_linear": True}, {"aggregation": "seq_mean_token_mean", "entropy_coef": 0.1}),
        ("qwen3", {"batching": "packed"}, {"divergence": "exact_tv"}),
        ("llama", {"batching": "packed", "fused_linear": True}, {"divergence": "binary_kl", "trust_region": "smooth"}),
    ],
)
def test_nothing_waits_between_the_first_forward_and_the_last_backward(
    ranks: RankPools, policy_kind: str, train: dict[str, Any], loss: dict[str, Any]
) -> None:
    (found,) = ranks(1).run(_waits, policy_kind, {}, train, loss)
    assert _unlisted(found) == set()


@pytest.mark.slow
@pytest.mark.parametrize("train", [{}, {"batching": "packed", "fused_linear": True}], ids=str)
def test_nor_on_two_ranks_with_experts(ranks: RankPools, train: dict[str, Any]) -> None:
    layout = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}
    for found in ranks(2).run(_waits, "qwen3_moe", layout, train, {"divergence": "topk_tv"}):
        assert _unlisted(found) == set()


def test_the_watch_notices_every_way_of_waiting() -> None:
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with DeviceWaits() as waits:
        values.sum().item()
        mask.nonzero()
        values[mask]
        values[mask] = 0.0
        values.masked_select(mask)
        torch.unique(values)
        assert torch.equal(values, values)
        values.repeat_interleave(torch.tensor([1, 2, 1, 1]))
        bool(mask.any())
        values.tolist()
        values.cpu()
        int(mask.sum())
    assert len(waits.found) == 12
    assert all("test_no_waiting" in caller for _, caller in waits.found)
    with DeviceWaits() as waits:
        torch.where(mask, values, 0.0).masked_fill(~mask, 1.0).index_select(0, torch.tensor([1, 0])).sum()
    assert waits.found == []
