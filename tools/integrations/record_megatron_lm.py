#!/usr/bin/env python3
"""Record what Megatron-LM's train_rl.py passes to its GRPO loss, unpacked and packed, and what its ``loss_func`` makes of it.

    git clone https://github.com/NVIDIA/Megatron-LM SOURCE && git -C SOURCE checkout COMMIT
    PYTHONPATH=SOURCE:. python tools/integrations/record_megatron_lm.py --commit COMMIT

Runs ``forward_step`` and ``loss_func`` of train_rl.py, and what they and the preparation of their data are made of
(``align_unpacked_inference_logprobs``, ``pack_all_trajectories``, ``pack_inference_logprobs``, ``load_packed_data_by_index``,
``selective_log_softmax``, ``calculate_grpo_loss``) as they stand in that source, on the rollouts of
tests/integrations/rollouts.py. The model is stood in for by their logits, and so is what is not reached. Run by hand, with
the megatron-core of that source.
"""

from __future__ import annotations

import argparse
import contextlib
import os
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
    transformers wandb triton zmq uvicorn fastapi httpx openai transformer_engine transformer_engine_torch datasets apex vllm
    torch.utils.tensorboard ray quart hypercorn aiohttp nvtx modelopt mamba_ssm causal_conv1d flashinfer torch_memory_saver
    multistorageclient simpy av ijson nltk
"""
LENGTH, PAD, EOD = 10, 0, 1  # the trainer appends one token to each row, an end that the engine did not draw
calls: list[dict[str, Any]] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="of the source on PYTHONPATH")
    commit = parser.parse_args().commit
    os.environ["NO_VCS_VERSION"] = "1"
    typing.override = typing_extensions.override  # type: ignore[attr-defined]  of Python 3.12, for which it is written
    stand_in_for(*ABSENT.split())
    import train_rl
    from megatron.core.package_info import __version__ as version
    from megatron.rl import rl_utils, sequence_packing_utils

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    def spy(**arguments: Any) -> Any:
        calls.append(arguments)
        return rl_utils.calculate_grpo_loss(**arguments)

    found = {}
    with patched(train_rl, rl_utils, sequence_packing_utils), mock.patch.object(train_rl, "calculate_grpo_loss", spy):
        for name, batch, logits in (
            ("unpacked", unpacked(rl_utils), padded_logits()),
            ("packed", *packed(sequence_packing_utils)),
        ):
            log_probs = rl_utils.selective_log_softmax(logits[:, :-1], batch["tokens"][:, 1:])
            is_packed = name == "packed"
            train_rl.get_args().rl_use_sequence_packing = is_packed
            with mock.patch.object(train_rl, "get_logprobs", return_value=log_probs):
                step = [torch.tensor(0)] if is_packed else list(batch.values())
                losses, loss_func = train_rl.forward_step(iter([step]), SimpleNamespace(modules=list))
            known = torch.arange(float(losses.numel())).view_as(losses)
            total, tokens, _ = loss_func(known)
            found[name] = {
                "call": calls[-1],
                "tokens": batch["tokens"],
                "loss_mask": loss_func.args[0].float(),
                "rows": rows(is_packed),
                "known": {"sum": total, "num_tokens": tokens},
            }
    bf16 = rl_utils.selective_log_softmax(padded_logits()[:, :-1].bfloat16(), padded_tokens()[:, 1:])
    save(
        "megatron_rl",
        {
            "framework": "megatron-core",
            "version": version,
            "commit": commit,
            **found,
            "bf16": {"dtype": str(bf16.dtype), "log_probs": bf16.float()},
        },
    )


def padded_tokens() -> torch.Tensor:
    """[b, LENGTH]"""
    ends = [torch.cat([r.tokens, torch.tensor([EOD])]) for r in make_rollouts()]
    return torch.stack([torch.nn.functional.pad(tokens, (0, LENGTH - len(tokens)), value=PAD) for tokens in ends])


def padded_logits() -> torch.Tensor:
    """[b, LENGTH, VOCAB] at the sampling temperature: train_rl.py knows none, so that the model's must be as it sampled."""
    logits = [r.logits[:, :VOCAB] / TEMPERATURE for r in make_rollouts()]
    return torch.stack([torch.nn.functional.pad(x, (0, 0, 0, LENGTH - len(x))) for x in logits])


def generation_masks() -> torch.Tensor:
    """[b, LENGTH] tokens that count: those that the engine drew, and the end that the trainer appended."""
    masks = torch.zeros(len(make_rollouts()), LENGTH, dtype=torch.bool)
    for i, r in enumerate(make_rollouts()):
        masks[i, r.prompt_length : len(r.tokens)] = r.loss_mask.bool()
        masks[i, len(r.tokens)] = True
    return masks


def engine_log_probs() -> list[torch.Tensor]:
    return [r.rollout_log_probs[r.loss_mask.bool()] for r in make_rollouts()]


def unpacked(rl_utils: Any) -> dict[str, torch.Tensor]:
    """What the data loader of prepare_data_for_update yields, in its order."""
    old = rl_utils.selective_log_softmax(padded_logits()[:, :-1], padded_tokens()[:, 1:])
    with mock.patch.object(rl_utils, "update_inference_logprobs_group_stats"):
        aligned = rl_utils.align_unpacked_inference_logprobs(engine_log_probs(), old, generation_masks(), None)
    return {
        "tokens": padded_tokens(),
        "advantages": torch.tensor([r.advantage for r in make_rollouts()]),
        "old_logprobs": old,
        "loss_mask": generation_masks().float(),
        "position_ids": torch.arange(LENGTH).expand(len(old), LENGTH),
        "ref_logprobs": old - 0.1,
        "inference_logprobs": aligned,
    }


def packed(packing: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One bin of all rollouts, in the context that train_rl.py loads it from, and its logits."""
    width = 40
    advantages = torch.tensor([r.advantage for r in make_rollouts()])
    context = packing.pack_all_trajectories(padded_tokens(), generation_masks(), None, advantages, width, 8, "fifo")
    log_probs, _ = packing.pack_inference_logprobs(engine_log_probs(), context.packing_info, generation_masks(), width)
    logits = torch.zeros(1, width, VOCAB)
    for i, start in zip(context.packing_info.bin_seq_indices[0], context.packing_info.seq_starts[0], strict=False):
        rollout = make_rollouts()[i]
        logits[0, start : start + len(rollout.tokens)] = rollout.logits[:, :VOCAB] / TEMPERATURE
    from megatron.rl.rl_utils import selective_log_softmax

    context.old_logprobs = selective_log_softmax(logits[:, :-1], context.packed_trajs[:, 1:])
    context.ref_logprobs = context.old_logprobs - 0.1
    context.packed_inference_logprobs = log_probs
    STATE.packing_context = context
    return {"tokens": context.packed_trajs}, logits


def rows(is_packed: bool) -> torch.Tensor:
    """Which row of the packed logits each position is; -1 for what is no token of a rollout."""
    starts = torch.tensor([0, *(len(r.tokens) for r in make_rollouts())]).cumsum(0)
    if not is_packed:
        found = torch.full((len(make_rollouts()), LENGTH), -1)
        for i, r in enumerate(make_rollouts()):
            found[i, : len(r.tokens)] = torch.arange(len(r.tokens)) + starts[i]
        return found
    info = STATE.packing_context.packing_info
    found = torch.full((1, STATE.packing_context.bin_size), -1)
    for i, start in zip(info.bin_seq_indices[0], info.seq_starts[0], strict=False):
        length = len(make_rollouts()[i].tokens)
        found[0, start : start + length] = torch.arange(length) + starts[i]
    return found


STATE = SimpleNamespace(packing_context=None, increment_sequences=lambda _: None)


@contextlib.contextmanager
def patched(train_rl: Any, rl_utils: Any, packing: Any) -> Any:
    """Megatron's globals for one CPU rank."""
    args = SimpleNamespace(
        rl_use_sequence_packing=False,
        rl_inference_logprobs_is_correction=True,
        rl_importance_sampling_truncation_coef=None,
        rl_sequence_packing_max_sequences_per_bin=8,
        grpo_clamp_eps_lower=0.2,
        grpo_clamp_eps_upper=0.2,
        grpo_kl_beta=0.0,
        grpo_entropy_term_weight=0.0,
        check_for_nan_in_loss_and_grad=False,
        check_for_spiky_loss=False,
    )
    world = torch.distributed.group.WORLD
    with contextlib.ExitStack() as stack:
        for module in (train_rl, rl_utils, packing):
            if hasattr(module, "get_args"):
                stack.enter_context(mock.patch.object(module, "get_args", return_value=args))
        stack.enter_context(mock.patch.object(train_rl, "get_timers", return_value=mock.MagicMock()))
        stack.enter_context(mock.patch.object(train_rl, "get_rl_runtime_state", return_value=STATE))
        stack.enter_context(mock.patch.object(train_rl, "is_pipeline_last_stage", return_value=True))
        stack.enter_context(mock.patch.object(train_rl, "stimer", mock.MagicMock()))
        stack.enter_context(mock.patch.object(rl_utils, "is_batch_invariant_mode_enabled", return_value=False))
        tokenizer = SimpleNamespace(pad=PAD, eod=EOD)
        stack.enter_context(mock.patch.object(packing, "get_tokenizer", return_value=tokenizer))
        stack.enter_context(mock.patch.object(packing, "get_nvtx_range", return_value=mock.MagicMock()))
        stack.enter_context(mock.patch.object(packing, "log_packing_efficiency"))
        stack.enter_context(mock.patch("torch.Tensor.cuda", lambda self, *_, **__: self))
        stack.enter_context(
            mock.patch.multiple(
                "megatron.core.parallel_state",
                get_data_parallel_world_size=mock.Mock(return_value=1),
                get_data_parallel_rank=mock.Mock(return_value=0),
                get_data_parallel_group=mock.Mock(return_value=world),
                get_context_parallel_world_size=mock.Mock(return_value=1),
            )
        )
        yield


if __name__ == "__main__":
    main()
