"""What the tests of several files run on ranks: a policy from a folder, its logits, its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import PreTrainedModel

from megatron_dppo.models.build import build_policy
from megatron_dppo.models.hf_config import load_hf_config
from megatron_dppo.models.hf_weights import load_hf_weights
from megatron_dppo.models.parallel import ParallelConfig, initialize_model_parallel

# name -> layout for two ranks, as keyword arguments: bodies are sent to other processes.
TWO_RANK_LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 without sequence parallelism": {"tensor_model_parallel_size": 2, "sequence_parallel": False},
    "PP2": {"pipeline_model_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2},
    "TP2 EP2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "DP2": {},
}


def loaded_policy(folder: str | Path, layout: dict[str, Any]) -> list[torch.nn.Module]:
    """Initialise model parallelism and load the checkpoint in fp32."""
    parallel = ParallelConfig(**layout)
    initialize_model_parallel(parallel, seed=1)
    chunks = build_policy(load_hf_config(folder), parallel, torch.float32)
    load_hf_weights(chunks, folder)
    return chunks


def example_tokens(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 250, (batch, length), generator=torch.Generator().manual_seed(3))


def full_logits(chunks: list[torch.nn.Module], tokens: torch.Tensor) -> torch.Tensor | None:
    """[b, s, padded vocabulary], on the last pipeline stage."""

    def forward_step(_: Iterator, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        output = model(tokens, _positions(tokens), None, runtime_gather_output=True)
        return output, lambda logits, non_loss_data=False: logits

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=chunks,
        num_microbatches=1,
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs[0].detach() if outputs else None


def put_gradients_in_place_of_weights(chunks: list[torch.nn.Module], tokens: torch.Tensor) -> None:
    """Replace every weight by its gradient of the mean next-token cross entropy, reduced over all ranks.

    Data-parallel ranks take rows of ``tokens`` in turn. The gradients can then be exported as weights are.
    """
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
    mine = tokens[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]

    def forward_step(_: Iterator, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        losses = model(mine, _positions(mine), None, labels=mine.roll(-1, dims=1))

        def loss_func(losses_bs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
            kept = losses_bs[:, :-1]
            return kept.sum(), torch.tensor(kept.numel(), dtype=torch.int), {}

        return losses, loss_func

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=wrapped,
        num_microbatches=1,
        seq_length=mine.shape[1],
        micro_batch_size=mine.shape[0],
        forward_only=False,
    )
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)


def put_hf_gradients_in_place_of_weights(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """The same for a Hugging Face model, by plain autograd."""
    logits = model(tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)


def _positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1]).expand_as(tokens)
