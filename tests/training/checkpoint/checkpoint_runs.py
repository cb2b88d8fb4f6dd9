"""What the tests of checkpoints run on ranks: a few steps of next-token training, saved and resumed on any layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.models.hf.weights import export_hf_weights
from megatron_dppo.ops.policy_stats import vocab_parallel_policy_stats
from megatron_dppo.training.checkpoint.load import TrainerState, load_checkpoint
from megatron_dppo.training.checkpoint.save import CheckpointWriter
from megatron_dppo.training.config.schema import AdamConfig
from megatron_dppo.training.policy.trainable import OptimizerState, TrainablePolicy, build_optimizer, wrap_for_training
from tests.models.policy_runs import Inputs, rows
from tests.models.tiny_policies import tiny_hf_config

# A schedule whose learning rate differs from step to step, decay and clipping: whatever is not restored shows in the loss.
OPTIMIZER = AdamConfig(
    lr=3e-3, lr_warmup_steps=3, lr_decay_style="cosine", weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0
)
TOTAL_STEPS = 20


def start(
    kind: str, layout: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[TrainablePolicy, OptimizerState]:
    """A policy with random weights, the same in every layout, and a fresh optimizer."""
    parallel = ParallelConfig(**layout)
    initialize_model_parallel(parallel, seed=3)
    hf_config = tiny_hf_config(kind, num_hidden_layers=4)
    chunks = build_policy(hf_config, parallel, dtype)
    initialize_randomly(chunks, seed=3)
    policy = wrap_for_training(chunks, hf_config, dtype, parallel)
    return policy, build_optimizer(policy, OPTIMIZER, TOTAL_STEPS)


def train(policy: TrainablePolicy, optimizer_state: OptimizerState, steps: range) -> list[float]:
    """Next-token training on two batches of four sequences in turn; returns the loss of each step, on every rank.

    The sequences are learnt by heart, so every step moves the loss by some percent.
    """
    return [_train_step(policy, optimizer_state, step) for step in steps]


def _train_step(policy: TrainablePolicy, optimizer_state: OptimizerState, step: int) -> float:
    tokens = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(step % 2))
    mine = rows(tokens)[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    for chunk in policy.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer_state.optimizer.zero_grad()

    def forward_step(batches: Iterator[Inputs], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        x = next(batches)

        def loss_func(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
            stats = vocab_parallel_policy_stats(
                logits,
                x.labels,
                vocab_size=policy.vocab_size,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                token_mask=x.kept,
                backend="torch",
            )
            loss = -stats.log_prob[x.kept].sum()
            return loss, x.kept.sum().int(), {"loss": loss.detach().clone()}

        return model(x.tokens, x.positions, None), loss_func

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(mine) for _ in policy.chunks] if len(policy.chunks) > 1 else iter(mine),
        model=policy.chunks if len(policy.chunks) > 1 else policy.chunks[0],
        num_microbatches=len(mine),
        seq_length=mine[0].whole_length,
        micro_batch_size=1,
        forward_only=False,
    )
    optimizer_state.optimizer.step()
    optimizer_state.scheduler.step(increment=1)
    counts = parallel_state.is_pipeline_last_stage(ignore_virtual=True) and (
        parallel_state.get_tensor_model_parallel_rank() == 0
    )
    total = torch.tensor(sum(float(output["loss"]) for output in outputs) if counts else 0.0, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def exported(policy: TrainablePolicy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in export_hf_weights(policy.chunks)}


def train_save_and_go_on(
    kind: str, layout: dict[str, Any], dtype: torch.dtype, folder: Path
) -> tuple[dict[str, torch.Tensor], list[float], dict[str, torch.Tensor]]:
    """Three steps, a checkpoint, five more. Returns (weights at the checkpoint, losses after it, weights at the end)."""
    policy, optimizer_state = start(kind, layout, dtype)
    train(policy, optimizer_state, range(3))
    save(folder, policy, optimizer_state, 3)
    saved = exported(policy)
    return saved, train(policy, optimizer_state, range(3, 8)), exported(policy)


def resume_and_go_on(
    kind: str, layout: dict[str, Any], dtype: torch.dtype, checkpoint: Path, copy_to: Path | None = None
) -> tuple[dict[str, torch.Tensor], list[float], dict[str, torch.Tensor]]:
    """The same from a checkpoint of three steps, of which this layout writes a checkpoint of its own to ``copy_to``."""
    policy, optimizer_state = start(kind, layout, dtype)
    state = load_checkpoint(checkpoint, policy, optimizer_state)
    assert state == TrainerState(3, weight_version=30, prompts_drawn=300)
    if copy_to is not None:
        save(copy_to, policy, optimizer_state, 3)
    saved = exported(policy)
    return saved, train(policy, optimizer_state, range(3, 8)), exported(policy)


def save(folder: Path, policy: TrainablePolicy, optimizer_state: OptimizerState, step: int) -> Path:
    state = TrainerState(step, weight_version=10 * step, prompts_drawn=100 * step)
    return CheckpointWriter(folder, keep=2, asynchronous=False).save(policy, optimizer_state, state)


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every whole tensor of a checkpoint but random states, read without any of the product's code."""
    reader = FileSystemReader(checkpoint)
    tensors = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and not name.startswith("random.")
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors
