#!/usr/bin/env python3
"""Record what other implementations of DPPO make of the Rosetta tokens: the weight of every token's gradient, w r A.

    git clone https://github.com/OWNER/NAME SOURCE && git -C SOURCE checkout COMMIT
    PYTHONPATH=SOURCE:. python tools/integrations/record_rosetta.py PEER --commit COMMIT

PEER is stable_rl (sail-sg/Stable-RL), skyrl (NovaSky-AI/SkyRL), tmax (hamishivi/tmax; SOURCE is its training/open-instruct)
or open_instruct (allenai/open-instruct, branch hamishivi/dppo-loss).

Runs their functions as they stand in that source; what they import and do not reach is stood in for. verl's are recorded by
record_verl.py. Run by hand.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.integrations.absent import stand_in_for
from tests.integrations.recording import save
from tests.integrations.rosetta_tokens import Tokens, rosetta_tokens, topk_tokens

DELTAS = {"tv": 0.15, "kl": 0.05}
Loss = Callable[[torch.Tensor, Tokens], tuple[torch.Tensor, dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--commit", required=True, help="of the source on PYTHONPATH")
    arguments = parser.parse_args()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # their compiled functions are run as they are written
    settings, losses = PEERS[arguments.peer]()
    tokens = rosetta_tokens()
    results = {}
    for name, loss_of in losses.items():
        log_pi = tokens.log_pi.clone().requires_grad_()
        loss, more = loss_of(log_pi, tokens)
        loss.backward()
        assert log_pi.grad is not None
        results[name] = {"loss": loss.detach(), "coefficient": -log_pi.grad, **more}
    if arguments.peer == "stable_rl":
        save("rosetta_stable_rl_topk", {"commit": arguments.commit, **stable_rl_topk()})
    about = {"framework": arguments.peer, "commit": arguments.commit, "settings": settings}
    save(f"rosetta_{arguments.peer}", {**about, "names": tokens.names, "results": results})


def stable_rl() -> tuple[dict[str, Any], dict[str, Loss]]:
    """``POLICY_LOSS_REGISTRY`` of verl/trainer/ppo/core_algos.py, with the actor's configuration as its class gives it."""
    stand_in_for("ray", "datasets", "codetiming", "peft", "transformers")
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    def loss(mode: str, kind: str, cap: float | None) -> Loss:
        config = FSDPActorConfig(
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio_low=DELTAS[kind],
            clip_ratio_high=DELTAS[kind],
            **({} if cap is None else {"clip_ratio_c": cap}),
        )

        def of(log_pi: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, dict[str, Any]]:
            nothing = torch.zeros(1, len(tokens.names))
            total, metrics = get_policy_loss_fn(mode)(
                old_log_prob=tokens.log_old[None],
                log_prob=log_pi[None],
                advantages=tokens.advantages[None],
                response_mask=torch.ones(1, len(tokens.names)),
                loss_agg_mode="seq-mean-token-sum",
                config=config,
                rollout_log_prob=tokens.log_mu[None],
                topk_kl=nothing,
                entropy=nothing,
            )
            return total, {"clip_fraction": metrics["actor/pg_clipfrac"]}

        return of

    default = FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    return {"cap by default": default.get("clip_ratio_c", 10.0), "delta by default": default.clip_ratio_low}, {
        f"dppo_binary_{kind}{suffix}, cap {'default' if cap is None else f'{cap:g}'}": loss(
            f"dppo_binary_{kind}{suffix}", kind, cap
        )
        for kind in DELTAS
        for suffix in ("", "_recompute")
        for cap in (None, 1e4)
    }


def stable_rl_topk() -> dict[str, Any]:
    """``compute_topk_kl`` of verl/workers/actor/utils.py, which their top-K modes read."""
    from verl.workers.actor.utils import compute_topk_kl

    tokens = topk_tokens()
    kl, tv = compute_topk_kl(tokens.logits, tokens.topk_ids, tokens.topk_log_mu)
    return {"topk_kl": kl, "topk_tv": tv}


def skyrl() -> tuple[dict[str, Any], dict[str, Loss]]:
    """``dppo_policy_loss`` of skyrl/backends/skyrl_train/utils/ppo_utils.py, with and without rollout log-probs."""
    import typing

    import typing_extensions

    typing.TypedDict = (
        typing_extensions.TypedDict
    )  # pydantic asks for it before Python 3.12, which SkyRL is written for
    stand_in_for("ray", "jaxtyping", "loguru", "cloudpickle", "datasets", "hydra", "peft", "skyrl_gym", "cloudpathlib")
    from skyrl.backends.skyrl_train.utils.ppo_utils import dppo_policy_loss
    from skyrl.train.config import AlgorithmConfig
    from skyrl.train.config.config import DPPOConfig

    def loss(kind: str, has_rollout: bool) -> Loss:
        config = AlgorithmConfig()
        config.dppo = DPPOConfig(dppo_type=f"binary_{kind}", delta_low=DELTAS[kind], delta_high=DELTAS[kind])

        def of(log_pi: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, dict[str, Any]]:
            total, metrics = dppo_policy_loss(
                log_pi[None],
                tokens.log_old[None],
                tokens.advantages[None],
                config,
                loss_mask=torch.ones(1, len(tokens.names)),
                rollout_logprobs=tokens.log_mu[None] if has_rollout else None,
            )
            return total, {"clip_fraction": metrics["clip_ratio"]}

        return of

    default = DPPOConfig()
    return {"delta by default": default.delta_low, "divergence by default": default.dppo_type}, {
        f"binary_{kind}, {'rollout' if has_rollout else 'no rollout'} log-probs": loss(kind, has_rollout)
        for kind in DELTAS
        for has_rollout in (True, False)
    }


def open_instruct() -> tuple[dict[str, Any], dict[str, Loss]]:
    """``compute_dppo_mask`` and ``compute_grpo_loss`` of open_instruct/grpo_utils.py, as grpo_fast.py puts them together."""
    stand_in_for(
        "deepspeed",
        "datasets",
        "ray",
        "vllm",
        "wandb",
        "beaker",
        "olmo_core",
        "peft",
        "accelerate",
        "bitsandbytes",
        "liger_kernel",
        "litellm",
        "torchmetrics",
        "openai",
        "google",
        "ring_flash_attn",
        "flash_attn",
        "tiktoken",
        "docker",
        "langdetect",
        "openenv",
        "fastmcp",
        "mcp",
        "immutabledict",
        "nltk",
        "backoff",
        "open_instruct.olmo_core_callbacks",
    )
    from open_instruct import grpo_utils

    def loss(kind: str) -> Loss:
        config = SimpleNamespace(
            loss_fn=grpo_utils.GRPOLossType.dppo, clip_lower=0.2, clip_higher=0.2, kl_estimator=2, beta=0.0
        )

        def of(log_pi: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, dict[str, Any]]:
            ratio = torch.exp(log_pi - tokens.log_mu)
            mask, divergence = grpo_utils.compute_dppo_mask(
                new_logprobs=log_pi,
                behavior_logprobs=tokens.log_mu,
                advantages=tokens.advantages,
                ratio=ratio,
                response_mask=torch.ones(len(tokens.names), dtype=torch.bool),
                divergence_type=getattr(grpo_utils.DPPODivergenceType, kind),
                divergence_threshold=DELTAS[kind],
            )
            asked = inspect.signature(grpo_utils.compute_grpo_loss).parameters
            given = (
                {"dppo_mask": mask, "rho_weights": torch.ones(())} if "dppo_mask" in asked else {"tis_weights": mask}
            )
            per_token, *_ = grpo_utils.compute_grpo_loss(
                log_pi, ratio, tokens.advantages, ref_logprobs=None, config=config, **given
            )
            return per_token.sum(), {
                "not_finite": [n for n, d in zip(tokens.names, divergence.tolist(), strict=True) if d - d != 0]
            }

        return of

    fields = grpo_utils.GRPOExperimentConfig.__dataclass_fields__
    settings = {"delta by default": fields["dppo_divergence_threshold"].default}
    return settings, {f"binary_{kind}": loss(kind) for kind in DELTAS}


PEERS = {"stable_rl": stable_rl, "skyrl": skyrl, "tmax": open_instruct, "open_instruct": open_instruct}

if __name__ == "__main__":
    main()
