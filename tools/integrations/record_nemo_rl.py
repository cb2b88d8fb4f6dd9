#!/usr/bin/env python3
"""Record what NeMo-RL passes to a loss function, padded and packed, and what its reducer makes of the result.

    git clone https://github.com/NVIDIA-NeMo/RL SOURCE && git -C SOURCE checkout COMMIT
    PYTHONPATH=SOURCE:. python tools/integrations/record_nemo_rl.py --commit COMMIT

Runs ``prepare_loss_input``, ``SequencePackingLossWrapper``, ``masked_mean`` and ``ClippedPGLossFn`` (for the names of its
metrics) as they stand in that source, on the rollouts of tests/integrations/rollouts.py, as the Megatron worker calls them,
on one rank. What they import and do not reach is stood in for. Run by hand.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.integrations.absent import stand_in_for
from tests.integrations.recording import save
from tests.integrations.rollouts import TEMPERATURE, VOCAB, make_rollouts

ABSENT = """
    transformers ray vllm datasets wandb mlflow swanlab torchdata nemo_automodel megatron.bridge decord zmq hydra pynvml
    accelerate uvicorn fastapi httpx aiohttp sglang openai nemo_gym prometheus_client nltk peft PIL torch.utils.tensorboard
    tabulate uvloop nvidia_resiliency_ext setproctitle coolname triton modelopt matplotlib debugpy
"""
PADDED_TO = 10  # the longest sample has 8 tokens
calls: list[dict[str, Any]] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="of the source on PYTHONPATH")
    commit = parser.parse_args().commit
    os.environ["NO_VCS_VERSION"] = "1"
    stand_in_for(*ABSENT.split())
    import nemo_rl
    from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType
    from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig, ClippedPGLossFn
    from nemo_rl.algorithms.loss.utils import prepare_loss_input
    from nemo_rl.algorithms.loss.wrapper import SequencePackingLossWrapper
    from nemo_rl.algorithms.utils import masked_mean
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    class Recorder:
        input_type, loss_type = LossInputType.LOGPROB, LossType.TOKEN_LEVEL

        def __call__(self, **arguments: Any) -> Any:
            calls.append(arguments)
            return arguments["next_token_logprobs"].sum(), {"loss": 0.0}

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    group = torch.distributed.group.WORLD
    fields, logits = padded_batch()
    data = BatchedDataDict(fields)
    totals = {"global_valid_seqs": torch.tensor(8.0), "global_valid_toks": torch.tensor(32.0)}  # of two such batches
    loss_input, data = prepare_loss_input(
        logits=logits, data=data, loss_fn=Recorder(), vocab_parallel_rank=0, vocab_parallel_group=group
    )
    Recorder()(data=data, **totals, **loss_input)
    lengths = torch.tensor([len(r.tokens) for r in make_rollouts()])
    packed = torch.cat([r.logits[:, :VOCAB] for r in make_rollouts()])[None] / TEMPERATURE
    cumulative = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    SequencePackingLossWrapper(Recorder(), prepare_loss_input, cumulative, None, 0, group, None)(
        packed, BatchedDataDict(fields), **totals
    )
    values, mask = torch.arange(1.0, 10.0).square().expand(4, 9), fields["token_mask"][:, 1:]
    means = {
        "per_token": masked_mean(values, mask, global_normalization_factor=totals["global_valid_toks"]),
        "per_sequence": masked_mean(
            masked_mean(values, mask, dim=-1),
            fields["sample_mask"],
            global_normalization_factor=totals["global_valid_seqs"],
        ),
    }
    own_loss = ClippedPGLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0))
    _, metrics = own_loss(data=data, **totals, **loss_input)
    save(
        "nemo_rl",
        {
            "framework": "nemo_rl",
            "version": nemo_rl.__version__,
            "commit": commit,
            "padded": plain(calls[0]),
            "packed": [plain(call) for call in calls[1:]],
            "values": values,
            "means": means,
            "types": {"loss": [t.name for t in LossType], "input": [t.name for t in LossInputType]},
            "metric_normalizations": {name: value.name for name, value in own_loss.metric_normalizations.items()},
            "metrics": sorted(metrics),
        },
    )


def plain(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "data": dict(call["data"])}


def padded_batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """[b, s] fields as grpo.py fills them, padded on the right, and [b, s, VOCAB] logits at the sampling temperature.

    generation_logprobs stand at the tokens that they are of, and are 0 for prompts; the same goes for advantages.
    """
    rollouts = make_rollouts()
    shape = (len(rollouts), PADDED_TO)
    fields = {name: torch.zeros(shape) for name in ("advantages", "generation_logprobs", "prev_logprobs")}
    fields["input_ids"] = torch.zeros(shape, dtype=torch.int64)
    fields["token_mask"] = torch.zeros(shape, dtype=torch.int64)
    fields["sample_mask"] = torch.ones(len(rollouts))
    logits = torch.zeros(*shape, VOCAB)
    for i, rollout in enumerate(rollouts):
        prompt, length = rollout.prompt_length, len(rollout.tokens)
        fields["input_ids"][i, :length] = rollout.tokens
        fields["token_mask"][i, prompt:length] = rollout.loss_mask
        fields["generation_logprobs"][i, prompt:length] = rollout.rollout_log_probs
        fields["advantages"][i] = rollout.advantage
        logits[i, :length] = rollout.logits[:, :VOCAB] / TEMPERATURE
    return fields, logits


if __name__ == "__main__":
    main()
