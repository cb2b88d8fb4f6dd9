"""The folder of one start of a job, by which its processes on all hosts know of each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dppo.distributed.lifeline import EXIT_ANOTHER_FAILED
from megatron_dppo.errors import EXIT_START_AGAIN

_GOES_ON = (EXIT_START_AGAIN, EXIT_ANOTHER_FAILED)


@dataclass(frozen=True)
class Attempt:
    """Paths in it.

    Attributes:
        folder: on a file system that all hosts share.
    """

    folder: Path

    @property
    def stop_file(self) -> Path:
        """Made by whoever wants the run to save and stop; the trainer's agents look for it."""
        return self.folder / "stop"

    @property
    def registry(self) -> Path:
        """Of the servers of this start alone: nobody of an earlier one is in it."""
        return self.folder / "servers"

    def log(self, role: str, node: int) -> Path:
        """What the processes of a node say."""
        return self.folder / f"{role}-{node}.log"

    def exit_code_file(self, node: int) -> Path:
        """The exit code of a trainer node, once it has ended."""
        return self.folder / f"trainer-{node}.exit"

    def write_exit_code(self, node: int, code: int) -> None:
        """For a scheduler that has only one number for all nodes; the first one also says if the run does not go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.exit_code_file(node).write_text(f"{code}\n", encoding="utf-8")
        if node == 0 and code not in _GOES_ON:
            self._done_file.touch()

    def was_done_after(self, moment: float) -> bool:
        """Whether the run has ended for good, after ``moment`` (seconds since the epoch)."""
        try:
            return self._done_file.stat().st_mtime > moment
        except FileNotFoundError:
            return False

    @property
    def _done_file(self) -> Path:
        return self.folder / "done"
