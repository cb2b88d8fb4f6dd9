"""Writing checkpoints, while training waits or while it goes on.

A save has three parts. *Staging* copies this rank's pieces to the host, so that training may change them; *writing*
brings them to disk, into ``step_N.incomplete``; *publishing* renames that folder to ``step_N`` when the files of every
rank are on disk. With ``asynchronous`` the last two run in a thread, which coordinates with the threads of the other ranks
over a process group of its own. Publishing is part of the thread, so a finished checkpoint never waits for training to
look after it; what a killed save leaves behind is never loaded and is removed by the next save.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from megatron_dppo.distributed.collectives import on_one_rank
from megatron_dppo.errors import CheckpointError
from megatron_dppo.training.checkpoint.info import CheckpointInfo, TrainerState, describe
from megatron_dppo.training.checkpoint.load import checkpoint_path, complete_checkpoints, last_checkpoint
from megatron_dppo.training.checkpoint.pieces import Piece, optimizer_pieces, random_state_pieces, weight_pieces
from megatron_dppo.training.checkpoint.storage import write_pieces
from megatron_dppo.training.policy.trainable import OptimizerState, TrainablePolicy

_INCOMPLETE = ".incomplete"
_REPLACED = f".replaced{_INCOMPLETE}"
# How long ranks wait for each other's files; far more than any file system needs.
_TIMEOUT = timedelta(hours=1)

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of one run. All ranks construct it, and call its methods together.

    A context manager: it leaves only when no save is under way. If it is left because of an exception, a save that
    fails at that time is logged, so that it does not hide the exception.

    Args:
        folder: that holds the checkpoints.
        keep: number of complete checkpoints to keep; older ones are deleted.
        asynchronous: return from ``save`` as soon as the state is staged. Needs host memory for one copy of this rank's
            part (with bf16 weights 2 bytes for each parameter, and 12 for its optimizer state).
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool) -> None:
        self.folder = folder
        self.keep = keep
        self.group: dist.ProcessGroup | None = None
        self.executor: ThreadPoolExecutor | None = None
        self.under_way: Future[None] | None = None
        _on_first_rank(self._bring_back_replaced, f"{folder} cannot be put in order", None)
        if asynchronous:
            self.group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
            self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def last(self) -> Path | None:
        """The newest complete checkpoint, or None: what rank 0 sees, on all ranks, so that they start from the same one."""
        return on_one_rank(lambda: last_checkpoint(self.folder))

    def save(self, policy: TrainablePolicy, optimizer_state: OptimizerState | None, state: TrainerState) -> Path:
        """Write a checkpoint of ``state.step``; waits for the save before it. Returns the folder it is, or will be, in.

        Args:
            policy: its weights are saved.
            optimizer_state: saved too; None: the checkpoint is one to start from.
            state: where the loop stands.

        Raises:
            CheckpointError: on every rank alike, if this save cannot begin, or the one before it failed.
        """
        self.finish()
        final = checkpoint_path(self.folder, state.step)
        partial = final.with_name(final.name + _INCOMPLETE)
        _on_first_rank(lambda: self._make_room(partial), f"{partial} cannot be made", None)
        info = describe(policy, optimizer_state, state)
        pieces = self._stage(policy, optimizer_state)
        if self.executor is None:
            self._write(pieces, info, partial, final)
        else:
            self.under_way = self.executor.submit(self._write, pieces, info, partial, final)
        return final

    def finish(self) -> None:
        """Wait until the save that is under way is complete, if there is one. Raises CheckpointError if it failed."""
        if self.under_way is not None:
            under_way, self.under_way = self.under_way, None
            under_way.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
            elif self.under_way is not None:
                wait([self.under_way])
                if (failure := self.under_way.exception()) is not None:
                    _log.error("a checkpoint that was being written is lost: %s", failure)
        finally:
            if self.executor is not None:
                self.executor.shutdown()
                dist.destroy_process_group(self.group)

    def _bring_back_replaced(self) -> None:
        """Of a run that was killed while it put one checkpoint in another's place: the other is whole, maybe the only one."""
        for replaced in self.folder.glob(f"*{_REPLACED}"):
            final = replaced.with_name(replaced.name.removesuffix(_REPLACED))
            if not final.exists():
                replaced.rename(final)

    def _make_room(self, partial: Path) -> None:
        for leftover in self.folder.glob(f"*{_INCOMPLETE}"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)

    @torch.no_grad()
    def _stage(self, policy: TrainablePolicy, optimizer_state: OptimizerState | None) -> list[Piece]:
        pieces = list(weight_pieces(policy.chunks, policy.hf_config))
        if optimizer_state is not None:
            pieces += optimizer_pieces(policy, optimizer_state.optimizer)
        if self.executor is not None:
            # Even where the values are on the host already: training goes on changing them.
            pieces = [
                dataclasses.replace(piece, values=piece.values.to("cpu", copy=True))
                for piece in pieces
                if piece.is_saved
            ]
        return [*pieces, *random_state_pieces()]

    def _write(self, pieces: list[Piece], info: CheckpointInfo, partial: Path, final: Path) -> None:
        write_pieces(pieces, partial, self.group)
        _on_first_rank(lambda: self._publish(info, partial, final), f"{final} cannot be completed", self.group)

    def _publish(self, info: CheckpointInfo, partial: Path, final: Path) -> None:
        info.write(partial)
        if final.exists():  # a run that was stopped right after a save, and saves the same step once more
            replaced = final.with_name(final.name + _REPLACED)
            final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced)
        else:
            partial.rename(final)
        complete = complete_checkpoints(self.folder)
        for old in complete[: max(len(complete) - self.keep, 0)]:
            shutil.rmtree(old)


def _on_first_rank(action: Callable[[], None], what_fails: str, group: dist.ProcessGroup | None) -> None:
    """Do something on rank 0; if it fails, every rank raises CheckpointError."""
    on_one_rank(
        action,
        group=group,
        failure=lambda error: CheckpointError(f"{what_fails}: {type(error).__name__}: {error}"),
    )
