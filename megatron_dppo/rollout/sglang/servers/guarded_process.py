"""A process that is always ended together with everything it started, even if this process is killed."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_dppo.errors import RolloutError
from megatron_dppo.rollout.sglang.servers.scratch import Scratch

_GUARD = Path(__file__).parent / "guard.py"
_TERMINATE_GRACE_S = 3.0
_LOG_TAIL_BYTES = 4000


class GuardedProcess:
    """Started when it is made, in a session of its own; what it says is appended to a log."""

    def __init__(
        self,
        command: Sequence[str],
        log_path: Path,
        environment: Mapping[str, str],
        extra_grace_s: float = 0.0,
        scratch: Scratch | None = None,
    ) -> None:
        """Raises RolloutError if the command cannot be started.

        Args:
            command: program and arguments. Its standard input stays open, and empty, until ``end``, or until this process
                has ended, however that came about.
            log_path: of its output, after a line with the command. The folder is made.
            environment: all of its environment.
            extra_grace_s: that it may take, beyond the usual, to end by itself once it was told to.
            scratch: its folder for temporary files, of which its environment is then to be; removed, with what its processes
                have left in shared memory, when they have ended.
        """
        self._scratch = scratch
        self._extra_grace_s = extra_grace_s
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        guard = [sys.executable, str(_GUARD), str(os.getpid()), str(scratch.folder) if scratch else ""]
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            try:
                self._process = subprocess.Popen(
                    [*guard, *command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    start_new_session=True,
                    pass_fds=[scratch.lock] if scratch else [],
                )
            except OSError as error:
                if scratch:
                    scratch.remove()
                raise RolloutError(f"{command[0]} cannot be started: {error}") from error
        atexit.register(self.end)

    @property
    def pid(self) -> int:
        """Of the guard, which leads the process group of everything that was started."""
        return self._process.pid

    def is_running(self) -> bool:
        """Whether the command has not ended."""
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Of the command, 128 + signal if one ended it; None while it runs."""
        return self._process.poll()

    def output(self) -> bytes:
        """What it has said."""
        return self.log_path.read_bytes()[self._log_start :]

    def log_tail(self) -> str:
        """Where the log is, and how it ends."""
        return f"The end of {self.log_path}:\n{self.output()[-_LOG_TAIL_BYTES:].decode(errors='replace')}"

    def ask_to_end(self) -> None:
        """Tell it and every process of its group to end, without waiting: for several that are to end at the same time."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def end(self) -> None:
        """End it and every process of its group, and remove what they leave. Safe to call twice."""
        atexit.unregister(self.end)
        group = self._process.pid
        self.ask_to_end()
        deadline = time.monotonic() + _TERMINATE_GRACE_S + self._extra_grace_s
        while _group_exists(group) and time.monotonic() < deadline:
            self._process.poll()  # reap it: a zombie would keep the group alive
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._process.wait()
        if self._scratch:
            self._scratch.remove()


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
