"""Runs a section in a process of its own. A check that hangs, or takes the process with it, costs its row and no more.

An error on a GPU leaves a process with a context in which everything fails, so after an end that was not planned the section
goes on in a new one, at the next check.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.check.gpu_check.extension import ROOT, last_error
from tools.check.gpu_check.findings import Options
from tools.check.gpu_check.table import Row

IMPORT_LIMIT_S = 180.0  # of torch and Megatron-core, from a cold disk
_ENDING_S = 10.0  # that a process and its children have after being asked to end


def run_section(section: str, options: Options, deadline: float, log: Path, limit_s: float | None) -> Iterator[Row]:
    """Yield the rows of a section.

    Args:
        section: its name.
        options: for its checks.
        deadline: of ``time.monotonic()``; what has not begun by then is not run.
        log: what the checks print is added to it.
        limit_s: no check gets more time than this; None: its own limit.
    """
    first = 0
    while True:
        attempt = _Attempt(section, first, options, deadline, log, limit_s)
        yield from attempt.rows()
        if attempt.finished:
            return
        yield Row(section, attempt.check or section, attempt.outcome, attempt.reason, seconds=attempt.took())
        if attempt.begun is None or time.monotonic() >= deadline:
            return  # the next attempt would end the same way
        first = attempt.begun + 1


class _Attempt:
    """One process."""

    def __init__(
        self, section: str, first: int, options: Options, deadline: float, log: Path, limit_s: float | None
    ) -> None:
        self.section, self.first, self.options = section, first, options
        self.deadline, self.log, self.limit_s = deadline, log, limit_s
        self.finished = False
        self.begun: int | None = None  # the check that is being made
        self.check, self.outcome, self.reason = "", "failed", ""
        self._since = time.monotonic()

    def took(self) -> float:
        return time.monotonic() - self._since

    def rows(self) -> Iterator[Row]:
        read_end, write_end = os.pipe()
        settings = json.dumps({**asdict(self.options), "scratch": str(self.options.scratch)})
        command = [sys.executable, "-m", "tools.check.gpu_check.worker", self.section, str(self.first), str(write_end)]
        with self.log.open("ab") as output:
            output.write(f"--- {self.section}, from check {self.first} on\n".encode())
            output.flush()
            process = subprocess.Popen(
                [*command, settings],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[write_end],
                start_new_session=True,
            )
        os.close(write_end)
        self._since, limit = time.monotonic(), IMPORT_LIMIT_S
        try:
            lines = _Lines(read_end)
            while (line := lines.next(self._ends(limit))) is not None:
                if "begins" in line:
                    self.begun, self.check = line["begins"], line["check"]
                    own, self._since = line["limit_s"], time.monotonic()
                    limit = own if self.limit_s is None else min(own, self.limit_s)
                else:
                    share = line["seconds"] / max(len(line["rows"]), 1)
                    yield from (Row(self.section, seconds=share, **fields) for fields in line["rows"])
                    self.begun, self.check, self._since, limit = None, "", time.monotonic(), IMPORT_LIMIT_S
            if lines.ended:
                self._ended(process)
            else:
                self._out_of_time(limit)
        finally:
            os.close(read_end)
            end_group(process)

    def _ends(self, limit_s: float) -> float:
        return min(self._since + limit_s, self.deadline)

    def _out_of_time(self, limit_s: float) -> None:
        if time.monotonic() >= self.deadline:
            self.outcome, self.reason = "not run", "the time of the whole was over; nor is what follows in this section"
        else:
            self.reason = f"not done within its limit of {limit_s:g} s"

    def _ended(self, process: subprocess.Popen) -> None:
        try:
            code = process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            code = 0  # it has told everything, and hangs in what ends a process
        if code == 0 and self.begun is None:
            self.finished = True
        else:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.reason = f"its process ended with {how}: {last_error(self.log)}"


class _Lines:
    """JSON objects, one a line, from a pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._rest = descriptor, b""
        self.ended = False

    def next(self, until: float) -> dict[str, Any] | None:
        """The next one; None if nobody writes any more (``ended``), or if none has come by ``until``."""
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._descriptor], [], [], max(until - time.monotonic(), 0.0))
            if not ready:
                return None
            if not (data := os.read(self._descriptor, 65536)):
                self.ended = True
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


def end_group(process: subprocess.Popen) -> None:
    """Nothing of the process's group is left: it is asked to end (torchrun then ends its ranks), then made to."""
    for sign, wait_s in ((signal.SIGTERM, _ENDING_S), (signal.SIGKILL, _ENDING_S)):
        if not _signal_group(process.pid, sign):
            break
        _wait_until(lambda: process.poll() is not None and not _signal_group(process.pid, 0), wait_s)
    process.wait()


def _signal_group(group: int, sign: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, sign)
        return True
    return False


def _wait_until(condition: Callable[[], bool], limit_s: float) -> None:
    until = time.monotonic() + limit_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
