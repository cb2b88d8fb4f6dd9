"""Checkpoints of a run: finding the last one and resuming from it. Writing them: save.py.

A checkpoint is a folder ``step_N`` with checkpoint.json, a file of tensors for each rank that wrote and their index
(``torch.distributed.checkpoint``). It was written under another name and renamed when everything was on disk, so a folder
of that name is whole. Any layout can load it (pieces.py). The same layout goes on bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_dppo.models.sharding import unwrapped
from megatron_dppo.training.checkpoint.info import CheckpointInfo, TrainerState, present_layout
from megatron_dppo.training.checkpoint.optimizer_state import allocate_optimizer_state
from megatron_dppo.training.checkpoint.pieces import (
    optimizer_pieces,
    random_state_pieces,
    set_random_state,
    weight_pieces,
    zero_vocabulary_padding,
)
from megatron_dppo.training.checkpoint.storage import read_pieces
from megatron_dppo.training.policy.trainable import OptimizerState, TrainablePolicy

_COMPLETE = re.compile(r"step_(\d{8})")


def checkpoint_path(folder: Path, step: int) -> Path:
    """The complete checkpoint of a step."""
    return folder / f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(
        (path for path in folder.glob("step_*") if _COMPLETE.fullmatch(path.name)), key=lambda path: path.name
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


@torch.no_grad()
def load_checkpoint(path: Path, policy: TrainablePolicy, optimizer_state: OptimizerState) -> TrainerState:
    """Restore everything that a checkpoint holds. Collective over all ranks.

    ``optimizer_state`` is fresh. Its hyperparameters and schedule stay those of the present configuration; the position
    in the schedule is restored. Random states are restored on the layout that saved, and left as the seed set them on
    any other: nothing that a run draws depends on them (responses are sampled from seed and step, initial weights from
    the seed).

    Raises:
        CheckpointError: the checkpoint is of another model or cannot be read.
    """
    info = CheckpointInfo.read(path)
    info.check_model(path, policy.hf_config, policy.dtype, policy.fp32_head)
    pieces = list(weight_pieces(policy.chunks, policy.hf_config))
    if info.optimizer_steps:
        allocate_optimizer_state(optimizer_state.optimizer, info.optimizer_steps)
        pieces += optimizer_pieces(policy, optimizer_state.optimizer)
    same_layout = info.layout == present_layout(policy)
    random_state = list(random_state_pieces()) if same_layout else []
    zero_vocabulary_padding(policy.chunks, policy.hf_config)
    read_pieces([*pieces, *random_state], path)
    if not info.optimizer_steps:
        optimizer_state.optimizer.reload_model_params()  # the fp32 copies of 16-bit weights
    optimizer_state.scheduler.step(increment=info.optimizer_steps - optimizer_state.scheduler.num_steps)
    if same_layout:
        set_random_state(random_state)
    return info.trainer


@torch.no_grad()
def load_weights(path: Path, model_chunks: Sequence[torch.nn.Module]) -> None:
    """Fill a policy with the weights of a checkpoint, converted to the policy's dtype. Collective over all ranks.

    Raises:
        CheckpointError: the checkpoint is of another model or cannot be read.
    """
    hf_config = unwrapped(model_chunks)[0].hf_config
    CheckpointInfo.read(path).check_model(path, hf_config)
    zero_vocabulary_padding(model_chunks, hf_config)
    read_pieces(list(weight_pieces(model_chunks, hf_config)), path)
