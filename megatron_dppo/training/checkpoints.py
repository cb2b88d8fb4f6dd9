"""Saving and resuming through ``megatron.core.dist_checkpointing`` (torch_dist format).

A checkpoint is written into ``step_N.incomplete`` and renamed to ``step_N`` when every rank is done, so a folder without
that suffix is whole; what a killed save leaves behind is never loaded and is removed by the next save.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model

from megatron_dppo.training.policy import OptimizerState, TrainablePolicy

_COMPLETE = re.compile(r"step_(\d{8})")
_INCOMPLETE_SUFFIX = ".incomplete"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read; the message names the folder and the remedy."""


@dataclass
class TrainerState:
    """Where the loop stands.

    Attributes:
        step: completed training steps.
        weight_version: of the weights that the rollout engine was given last.
        prompts_drawn: position in the stream of training prompts.
    """

    step: int = 0
    weight_version: int = 0
    prompts_drawn: int = 0


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    complete = [path for path in folder.glob("step_*") if _COMPLETE.fullmatch(path.name)]
    return max(complete, key=lambda path: path.name, default=None)


def save_checkpoint(
    folder: Path, policy: TrainablePolicy, optimizer_state: OptimizerState, state: TrainerState, keep: int
) -> Path:
    """Write a checkpoint of ``state.step`` and delete all but the newest ``keep``. Collective over all ranks."""
    final = folder / f"step_{state.step:08d}"
    partial = final.with_name(final.name + _INCOMPLETE_SUFFIX)
    if dist.get_rank() == 0:
        for leftover in folder.glob(f"*{_INCOMPLETE_SUFFIX}"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(
        {
            **_sharded_state(policy, optimizer_state, is_loading=False),
            "scheduler": optimizer_state.scheduler.state_dict(),
            "trainer": asdict(state),
        },
        str(partial),
    )
    torch.save(_rng_state(), partial / f"rng_rank_{dist.get_rank():05d}.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        complete = sorted(path for path in folder.glob("step_*") if _COMPLETE.fullmatch(path.name))
        for old in complete[: max(len(complete) - keep, 0)]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load_checkpoint(path: Path, policy: TrainablePolicy, optimizer_state: OptimizerState) -> TrainerState:
    """Restore everything that ``save_checkpoint`` wrote. Collective over all ranks.

    Random state is restored when the number of ranks is the one that saved; on another layout it starts from the seed.
    """
    try:
        loaded = dist_checkpointing.load(_sharded_state(policy, optimizer_state, is_loading=True), str(path))
    except Exception as error:
        raise CheckpointError(
            f"{path}: the checkpoint does not load into this policy ({type(error).__name__}: {error}); resume with the"
            " model and optimizer settings of its config.yaml, or set run.name to start a new run"
        ) from error
    for index, chunk in enumerate(policy.chunks):
        unwrap_model(chunk).load_state_dict(loaded[_model_key(index)])
    with torch.no_grad():
        optimizer_state.optimizer.load_state_dict(loaded["optimizer"])
    optimizer_state.scheduler.load_state_dict(loaded["scheduler"])
    if len(list(path.glob("rng_rank_*.pt"))) == dist.get_world_size():
        _restore_rng(torch.load(path / f"rng_rank_{dist.get_rank():05d}.pt", weights_only=False))
    return TrainerState(**loaded["trainer"])


def _model_key(index: int) -> str:
    return f"model{index}"


def _sharded_state(policy: TrainablePolicy, optimizer_state: OptimizerState, is_loading: bool) -> dict[str, Any]:
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    state: dict[str, Any] = {
        _model_key(index): unwrap_model(chunk).sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(policy.chunks)
    }
    models = state[_model_key(0)] if len(policy.chunks) == 1 else state.copy()
    state["optimizer"] = optimizer_state.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
    return state


def _rng_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
