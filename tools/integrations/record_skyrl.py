#!/usr/bin/env python3
"""Record what SkyRL's worker passes to a registered policy loss, and how it scales advantages.

    git clone https://github.com/NovaSky-AI/SkyRL SOURCE && git -C SOURCE checkout COMMIT
    PYTHONPATH=SOURCE:. python tools/integrations/record_skyrl.py --commit COMMIT

Runs ``PolicyWorkerBase._forward_backward_micro`` up to its call of the loss, ``apply_loss_reduction_to_advantages_minibatch``
and ``PolicyLossRegistry`` as they stand in that source, on the rollouts of tests/integrations/rollouts.py. The model is stood
in for by their log-probs, and so is what is not reached. Run by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import typing_extensions

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.integrations.absent import stand_in_for
from tests.integrations.recording import save
from tests.integrations.rollouts import TEMPERATURE, VOCAB, make_rollouts

ABSENT = """
    ray jaxtyping loguru cloudpickle datasets hydra peft skyrl_gym cloudpathlib transformers vllm wandb accelerate flash_attn
    fastapi uvicorn httpx aiohttp tinker sqlmodel sqlalchemy rich typer jax flax optax safetensors PIL s3fs fsspec gcsfs
    megatron.bridge torchdata pybind11 liger_kernel nvtx
"""
WIDTH = 8
calls: list[dict[str, Any]] = []


class CalledError(Exception):
    """The loss was called; what comes after it in the worker is not wanted."""


def recorder(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    config: Any,
    loss_mask: torch.Tensor,
    rollout_logprobs: torch.Tensor,
) -> Any:
    calls.append({**locals(), "config": {"off_policy_correction": vars(config.off_policy_correction)}})
    raise CalledError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="of the source on PYTHONPATH")
    commit = parser.parse_args().commit
    typing.TypedDict = (
        typing_extensions.TypedDict
    )  # pydantic asks for it before Python 3.12, which SkyRL is written for
    stand_in_for(*ABSENT.split())
    import skyrl
    from skyrl.backends.skyrl_train.utils import off_policy_correction_utils, ppo_utils
    from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase
    from skyrl.train.config import AlgorithmConfig

    config = AlgorithmConfig(policy_loss_type="recorder", temperature=TEMPERATURE)
    ppo_utils.PolicyLossRegistry.register("recorder", recorder)
    batch = padded_batch()
    scaled = {
        reduction: ppo_utils.apply_loss_reduction_to_advantages_minibatch(
            batch["advantages"], batch["loss_mask"], reduction, micro_batch_size=4, max_seq_len=WIDTH
        )
        for reduction in ("token_mean", "sequence_mean", "seq_mean_token_sum_norm")
    }
    worker = SimpleNamespace(
        model=mock.Mock(side_effect=lambda *_, **__: (batch["log_probs"], {})),
        cfg=SimpleNamespace(algorithm=config),
        policy_loss_fn=ppo_utils.PolicyLossRegistry.get("recorder"),
    )
    worker.model.train = lambda: None
    experience = SimpleNamespace(
        to_device=lambda _: None,
        sequences=None,
        action_log_probs=batch["log_probs"].detach(),
        base_action_log_probs=None,
        advantages=scaled["token_mean"],
        num_actions=WIDTH,
        attention_mask=None,
        loss_mask=batch["loss_mask"],
        response_mask=None,
        rollout_logprobs=batch["rollout_logprobs"],
        pixel_values=None,
        image_grid_thw=None,
    )
    with mock.patch("torch.cuda.current_device", return_value=0), contextlib.suppress(CalledError):
        PolicyWorkerBase._forward_backward_micro(worker, experience, 1.0)
    save(
        "skyrl",
        {
            "framework": "skyrl",
            "version": skyrl.__version__,
            "commit": commit,
            "call": calls[0],
            "advantages": batch["advantages"],
            "scaled": scaled,
            "tokens": batch["tokens"],
            "rows": batch["rows"],
            "correction_by_default": off_policy_correction_utils.off_policy_correction_enabled(
                config.off_policy_correction
            ),
        },
    )


def padded_batch() -> dict[str, torch.Tensor]:
    """[b, WIDTH] responses, padded on the right; ``rows``: those of the packed logits that predict them, -1 for padding."""
    rollouts = make_rollouts()
    names = ("log_probs", "rollout_logprobs", "advantages", "loss_mask")
    fields = {name: torch.zeros(len(rollouts), WIDTH) for name in names}
    fields["tokens"], fields["rows"] = torch.zeros(2, len(rollouts), WIDTH, dtype=torch.int64)
    fields["rows"] -= 1
    start = 0
    for i, r in enumerate(rollouts):
        length = len(r.response)
        log_probs = (r.logits[r.predicting, :VOCAB] / TEMPERATURE).log_softmax(-1)
        fields["log_probs"][i, :length] = log_probs.gather(-1, r.response[:, None])[:, 0]
        fields["rollout_logprobs"][i, :length] = r.rollout_log_probs
        fields["advantages"][i, :length] = r.advantage
        fields["loss_mask"][i, :length] = r.loss_mask.float()
        fields["tokens"][i, :length] = r.response
        fields["rows"][i, :length] = start + torch.arange(len(r.tokens))[r.predicting]
        start += len(r.tokens)
    return fields


if __name__ == "__main__":
    main()
