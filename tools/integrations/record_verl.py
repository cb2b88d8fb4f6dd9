#!/usr/bin/env python3
"""Record what verl passes to a policy loss and to its log-prob operator, and what its own DPPO makes of the Rosetta tokens.

    git clone https://github.com/verl-project/verl SOURCE && git -C SOURCE checkout COMMIT
    PYTHONPATH=SOURCE:. python tools/integrations/record_verl.py --commit COMMIT

Runs verl's ``ppo_loss``, ``agg_loss``, ``dppo_tv``, ``dppo_kl``, ``no_padding_2_padding``, ``EngineRegistry`` and
``_lm_head_logits_processor`` as they stand in that source, on the rollouts of tests/integrations/rollouts.py. What verl
imports and these do not reach is stood in for (``ABSENT``). Needs tensordict, hydra-core and megatron-core beside torch; run
by hand, on one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.integrations.absent import stand_in_for
from tests.integrations.recording import save
from tests.integrations.rollouts import PADDED, TEMPERATURE, VOCAB, make_rollouts, packed_logits
from tests.integrations.rosetta_tokens import rosetta_tokens

ABSENT = (
    "ray",
    "datasets",
    "codetiming",
    "mbridge",
    "megatron.bridge",
    "peft",
    "modelopt",
    "triton",
    "accelerate",
    "torchdata",
)
PLUGIN = """
from megatron_dppo import DPPOConfig
from megatron_dppo.integrations.verl import register
register("dppo", DPPOConfig(divergence="binary_tv"))
"""
OVERRIDES = [
    "model_engine=megatron",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.policy_loss.loss_mode=recorder",
    "actor_rollout_ref.rollout.calculate_log_probs=True",
    "algorithm.rollout_correction.bypass_mode=True",
    "+actor_rollout_ref.actor.policy_loss.rollout_correction=${algorithm.rollout_correction}",
]
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="of the source on PYTHONPATH")
    commit = parser.parse_args().commit
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import transformers  # noqa: F401  before the stand-ins, which it would ask after

    stand_in_for(*ABSENT)
    registered = import_with_plugin()
    import verl

    about = {"framework": "verl", "version": verl.__version__, "commit": commit}
    batch = training_batch()
    call = recorded_call(batch)
    save(
        "verl",
        {
            **about,
            "plugin_registered": registered,
            "call": call,
            "row_of_response": response_rows(batch),
            "aggregated": aggregated(call),
            "log_prob_operator": log_prob_operator(),
        },
    )
    save("rosetta_verl", {**about, **rosetta()})


def import_with_plugin() -> bool:
    """Import verl with our module in VERL_USE_EXTERNAL_MODULES; whether it is in the registry afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "dppo_plugin.py").write_text(PLUGIN, encoding="utf-8")
        sys.path.insert(0, folder)
        os.environ["VERL_USE_EXTERNAL_MODULES"] = "dppo_plugin"
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
    return "dppo" in POLICY_LOSS_REGISTRY


def actor_config() -> Any:
    """The actor's configuration as a worker gets it."""
    import verl
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    folder = str(Path(verl.__file__).parent / "trainer" / "config")
    with initialize_config_dir(folder, version_base=None):
        return omega_conf_to_dataclass(compose("ppo_trainer", overrides=OVERRIDES).actor_rollout_ref.actor)


def training_batch() -> Any:
    """The rollouts as verl's trainer sends them to a worker: nested tensors of the responses."""
    from tensordict import TensorDict

    rollouts = make_rollouts()
    fields = {
        "prompts": [r.tokens[: r.prompt_length] for r in rollouts],
        "responses": [r.response for r in rollouts],
        "response_mask": [r.loss_mask for r in rollouts],
        "old_log_probs": [r.rollout_log_probs for r in rollouts],  # what bypass_mode makes of rollout_log_probs
        "advantages": [torch.full_like(r.rollout_log_probs, r.advantage) for r in rollouts],
    }
    nested = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in fields.items()}
    from verl.utils import tensordict_utils as tu

    batch = TensorDict(nested, batch_size=len(rollouts))
    num_tokens = int(sum(r.loss_mask.sum() for r in rollouts))
    # Two data-parallel ranks, the other of which has as many tokens.
    tu.assign_non_tensor(batch, dp_size=2, batch_num_tokens=2 * num_tokens, global_batch_size=2 * len(rollouts))
    return batch


def recorded_call(batch: Any) -> dict[str, Any]:
    """The arguments with which ``ppo_loss`` calls a registered policy loss."""
    from verl.trainer.ppo.core_algos import register_policy_loss
    from verl.workers.utils.losses import ppo_loss

    calls = []

    @register_policy_loss("recorder")
    def recorder(**arguments: Any) -> Any:
        calls.append(arguments)
        return arguments["log_prob"].sum(), {}

    tokens = torch.cat([r.tokens.roll(-1) for r in make_rollouts()])
    log_probs = (packed_logits()[:, :VOCAB] / TEMPERATURE).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    offsets = torch.tensor([0, *(len(r.tokens) for r in make_rollouts())]).cumsum(0)
    output = {"log_probs": torch.nested.nested_tensor_from_jagged(log_probs, offsets=offsets)}
    ppo_loss(actor_config(), output, batch)
    (call,) = calls
    config = call["config"]
    call["config"] = {
        "class": type(config).__name__,
        "policy_loss": {"rollout_correction": config.policy_loss.rollout_correction},
        "global_batch_info": dict(config.global_batch_info),
        "clip_ratio_c": config.get("clip_ratio_c", "absent"),
    }
    call["rollout_is_weights"] = call.get("rollout_is_weights")
    return call


def response_rows(batch: Any) -> torch.Tensor:
    """[b, r] which row of the packed logits predicts each response token; padding is 0."""
    from verl.workers.utils.padding import no_padding_2_padding

    return no_padding_2_padding(torch.arange(len(packed_logits())), batch)


def aggregated(call: dict[str, Any]) -> dict[str, torch.Tensor]:
    """``agg_loss`` of one loss matrix, in every mode."""
    from verl.trainer.ppo.core_algos import agg_loss

    info = call["config"]["global_batch_info"]
    losses = call["log_prob"].detach()
    return {mode: agg_loss(losses, call["response_mask"], mode, **info) for mode in AGGREGATIONS}


def log_prob_operator() -> dict[str, Any]:
    """Arguments and results of the Megatron engine's log-prob operator, at one rank, in bf16 and fp32."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    from megatron_dppo.integrations.verl import OneReadHead

    @EngineRegistry.register(model_type="language_model", backend="megatron", vendor="nvidia")
    class Engine(OneReadHead, MegatronEngineWithLMHead):
        pass

    os.environ.update({"VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia"})
    chosen = EngineRegistry.get_engine_cls("language_model", "megatron")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    label = torch.cat([r.tokens.roll(-1) for r in make_rollouts()])[None]
    flags = {
        "calculate_sum_pi_squared": True,
        "calculate_entropy": True,
        "distillation_use_topk": False,
        "distillation_only": False,
    }
    results = {}
    engine = SimpleNamespace(engine_config=SimpleNamespace(entropy_from_logits_with_chunking=False))
    for name, dtype, columns in (
        ("true", torch.float32, VOCAB),
        ("padded", torch.float32, PADDED),
        ("bf16", torch.bfloat16, VOCAB),
    ):
        logits = packed_logits()[None, :, :columns].to(dtype).contiguous()
        temperature = torch.full(label.shape, TEMPERATURE)
        unread = {"logits_processor_func": None, "batch": None, "data_format": "thd"}
        results[name] = MegatronEngineWithLMHead._lm_head_logits_processor(
            engine, logits, label, temperature, **flags, **unread
        )
    dist.destroy_process_group()
    return {
        "our_engine_is_chosen": chosen is Engine,
        "flags": flags,
        "label": label,
        "temperature": torch.full(label.shape, TEMPERATURE),
        "results": {name: {key: value.float() for key, value in result.items()} for name, result in results.items()},
    }


def rosetta() -> dict[str, Any]:
    """What verl's own losses make of the tokens: the gradient of their sum by log_prob, negated, i.e. w r A."""
    from verl.trainer.ppo import core_algos

    tokens = rosetta_tokens()
    found = {}
    for mode, delta in (("dppo_tv", 0.15), ("dppo_kl", 0.05)):
        for cap in (3.0, 1e4):  # what ActorConfig gives unless it is asked, and what verl's example sets
            for anchor in ("recomputed", "bypass"):
                config = actor_config()
                object.__setattr__(config, "clip_ratio_low", delta)
                object.__setattr__(config, "clip_ratio_high", delta)
                object.__setattr__(config, "clip_ratio_c", cap)
                log_prob = tokens.log_pi[None].clone().requires_grad_()
                loss, metrics = core_algos.get_policy_loss_fn(mode)(
                    old_log_prob=(tokens.log_old if anchor == "recomputed" else tokens.log_mu)[None],
                    log_prob=log_prob,
                    advantages=tokens.advantages[None],
                    response_mask=torch.ones(1, len(tokens.names), dtype=torch.bool),
                    loss_agg_mode="token-sum",
                    config=config,
                )
                loss.backward()
                found[f"{mode}, cap {cap:g}, {anchor}"] = {
                    "loss": loss.detach(),
                    "coefficient": -log_prob.grad[0],
                    "clip_fraction": metrics["actor/pg_clipfrac"],
                }
    return {"names": tokens.names, "default_cap": actor_config().get("clip_ratio_c", 20.0), "results": found}


if __name__ == "__main__":
    main()
