"""What the tests of several files run on ranks: a policy from a folder, its logits, its gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from transformers import PreTrainedModel

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.build import build_policy
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.models.hf.weights import load_hf_weights

# An fp32 rounding is 6e-8. A logit has passed about 20 roundings that depend on each other and is a sum of 64 products:
# some 1e-6 of the largest logit. Summing in another order may cost that several times over. A 5 % change to any one
# parameter moves the logits 100 times more (tests/models/test_tiny_policies.py).
LOGITS_TOLERANCE = 1e-5
# Of a gradient's largest element: it has passed the layers forwards and backwards. The sum over some 30 tokens adds less, a
# reduction left out or done twice 30 % and more, one token with another expert 1e-2.
GRADIENT_TOLERANCE = 2 * LOGITS_TOLERANCE

# name -> layout for two ranks, as keyword arguments: bodies are sent to other processes.
TWO_RANK_LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 without sequence parallelism": {"tensor_model_parallel_size": 2, "sequence_parallel": False},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2},
    "TP2 EP2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "TP2 EP2 allgather": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "moe_token_dispatcher": "allgather",
    },
    "EP2 allgather": {"expert_model_parallel_size": 2, "moe_token_dispatcher": "allgather"},
    "TP2 allgather": {"tensor_model_parallel_size": 2, "moe_token_dispatcher": "allgather"},
    "DP2": {},
}


def loaded_policy(
    folder: str | Path, layout: dict[str, Any], dtype: torch.dtype = torch.float32, **transformer_config: Any
) -> list[torch.nn.Module]:
    """Initialise model parallelism and load the checkpoint."""
    parallel = ParallelConfig(**layout)
    initialize_model_parallel(parallel, seed=1)
    chunks = build_policy(load_hf_config(folder), parallel, dtype, **transformer_config)
    load_hf_weights(chunks, folder)
    return chunks


def wrapped_policy(
    folder: str, layout: dict[str, Any], dtype: torch.dtype, overlap_grad_reduce: bool = False, **overrides: Any
) -> list[Any]:
    """The same, as training wraps it: in DistributedDataParallel, and in Float16Module for bf16."""
    parallel = ParallelConfig(**layout)
    initialize_model_parallel(parallel, seed=1)
    chunks = build_policy(load_hf_config(folder), parallel, dtype, **overrides)
    load_hf_weights(chunks, folder)
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap_grad_reduce)
    return [
        DistributedDataParallel(config, ddp_config, Float16Module(config, c) if dtype is torch.bfloat16 else c)
        for c in chunks
    ]


def example_tokens(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 250, (batch, length), generator=torch.Generator().manual_seed(3))


TOKENS = example_tokens()
# Uneven rows, and with sequence parallelism the first rank has fewer of the tokens than the second.
LOSS_MASK = torch.zeros(TOKENS.shape, dtype=torch.bool)
LOSS_MASK[0, 5:15], LOSS_MASK[1, 12:14] = True, True


@dataclass(frozen=True)
class Inputs:
    """One micro-batch as this rank computes it: [1, S] each, S tokens of a row or of packed sequences.

    ``kept`` is True where the loss counts; ``own`` [S] says where these tokens stand among those of all context-parallel
    ranks, ``whole_length`` is how many those are.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    kept: torch.Tensor
    own: torch.Tensor
    whole_length: int
    packed: PackedSeqParams | None


def rows(tokens: torch.Tensor) -> list[Inputs]:
    """Every row a micro-batch of its own."""
    return [_cut([row], [len(row)], packed=False) for row in tokens]


def packed(sequences: list[torch.Tensor]) -> Inputs:
    """One micro-batch of packed sequences, each padded as context parallelism asks for, then padding for the rest."""
    context = parallel_state.get_context_parallel_world_size()
    chunks = 2 * context if context > 1 else 1
    lengths = [math.ceil(len(sequence) / chunks) * chunks for sequence in sequences]
    multiple = math.lcm(chunks, context * parallel_state.get_tensor_model_parallel_world_size())
    rest = -sum(lengths) % multiple
    return _cut([*sequences, sequences[0][:0]], [*lengths, rest], packed=True)


def _cut(sequences: list[torch.Tensor], lengths: list[int], packed: bool) -> Inputs:
    """This rank's chunks of each sequence, which is first padded to its length with a token that is not neutral."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    bounds = [0, *itertools.accumulate(lengths)]
    tokens, kept = torch.full((bounds[-1],), 7), torch.zeros(bounds[-1], dtype=torch.bool)
    own, positions = [], []
    for sequence, start, end in zip(sequences, bounds[:-1], bounds[1:], strict=True):
        tokens[start : start + len(sequence)] = sequence
        kept[start : start + len(sequence) - 1] = True
        positions.append(torch.arange(end - start))
        chunks = torch.arange(start, end).chunk(2 * size) if size > 1 and end > start else ()
        own.extend([chunks[rank], chunks[2 * size - 1 - rank]] if chunks else [torch.arange(start, end)])
    places, boundaries = torch.cat(own), torch.tensor(bounds, dtype=torch.int32)
    whole = (tokens, torch.cat(positions), tokens.roll(-1), kept)
    params = PackedSeqParams("thd", boundaries, boundaries, boundaries, boundaries, max(lengths), max(lengths))
    return Inputs(*(x[places][None] for x in whole), places, bounds[-1], params if packed else None)


def full_logits(chunks: list[torch.nn.Module], inputs: list[Inputs]) -> list[torch.Tensor]:
    """[tokens, padded vocabulary] of every micro-batch, of all context-parallel ranks; empty but on the last stage."""

    def forward_step(batches: Iterator[Inputs], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        x = next(batches)
        output = model(x.tokens, x.positions, None, packed_seq_params=x.packed, runtime_gather_output=True)
        return output, lambda logits, non_loss_data=False: logits

    wholes = []
    outputs = _run_schedule(chunks, forward_step, inputs, forward_only=True)
    for x, logits in zip(inputs, outputs, strict=True) if outputs else ():
        whole = torch.zeros(x.whole_length, logits.shape[-1])
        whole[x.own] = logits.detach()[0]
        torch.distributed.all_reduce(whole, group=parallel_state.get_context_parallel_group())
        wholes.append(whole)
    return wholes


def put_gradients_in_place_of_weights(chunks: list[torch.nn.Module], inputs: list[Inputs]) -> None:
    """Replace every weight by its gradient of the mean next-token cross entropy, reduced over all ranks.

    Data-parallel ranks take micro-batches in turn. The gradients can then be exported as weights are.
    """
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
    for chunk in wrapped:
        chunk.train()
    mine = inputs[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]

    def forward_step(batches: Iterator[Inputs], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        x = next(batches)
        losses = model(x.tokens, x.positions, None, labels=x.labels, packed_seq_params=x.packed)

        def loss_func(losses_bs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
            return losses_bs[x.kept].sum(), x.kept.sum().int(), {}

        return losses, loss_func

    _run_schedule(wrapped, forward_step, mine, forward_only=False)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)


def _run_schedule(chunks: list[torch.nn.Module], forward_step: Any, inputs: list[Inputs], forward_only: bool) -> Any:
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(inputs) for _ in chunks],
        model=chunks,
        num_microbatches=len(inputs),
        # Of the whole sequences: core divides by the context-parallel size.
        seq_length=inputs[0].whole_length,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def put_hf_gradients_in_place_of_weights(model: PreTrainedModel, sequences: Iterable[torch.Tensor]) -> None:
    """The same for a Hugging Face model, by plain autograd, one sequence at a time."""
    count = sum(len(sequence) - 1 for sequence in sequences)
    for sequence in sequences:
        logits = model(sequence[None]).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum") / count).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
