"""A script on several ranks without the seconds that importing takes each of them.

Ranks are forked from one process that has imported what they need and done nothing else. What torchrun would give them stands
in their environment; everything else is as if they had been started from a shell.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing as mp
import os
import random
import runpy
import socket
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_GRACE_S = 10.0  # of the other ranks, once one has failed


def forkserver() -> Any:
    """The multiprocessing context whose processes have everything imported."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.rank_imports"])
    return context


_given_ports: set[int] = set()


def free_port() -> int:
    """One that nobody uses, and that was not given before: its user may not have taken it yet.

    Nor may it be one that the system gives away, to the near end of somebody's connection.
    """
    first_given_away = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10000, first_given_away)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            if port not in _given_ports:
                _given_ports.add(port)
                return port


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank of a single node."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_script(script: Path, arguments: Sequence[str], *, ranks: int, folder: Path, timeout: float) -> tuple[int, str]:
    """Run ``script`` on so many ranks, in ``folder``; returns the first exit code that is not 0, or 0, and all output.

    When a rank fails the others have a little time to end by themselves; then they, or after ``timeout`` all, are killed.
    """
    codes, output = start_script(script, arguments, ranks=ranks, folder=folder, timeout=timeout).ends(_GRACE_S)
    return next((code for code in codes if code > 0), next((code for code in codes if code), 0)), output


@dataclass(frozen=True)
class StartedScript:
    """A script on ranks that may run until ``deadline``."""

    processes: list[BaseProcess]
    log: Path
    deadline: float

    def ends(self, grace: float = math.inf) -> tuple[list[int], str]:
        """The exit code of each rank, minus the signal if one ended it, and all output.

        What runs after the deadline, or ``grace`` after the first has failed, is killed.
        """
        deadline = self.deadline
        while running := [process for process in self.processes if process.exitcode is None]:
            wait([process.sentinel for process in running], timeout=max(deadline - time.monotonic(), 0.0))
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + grace)
            if time.monotonic() >= deadline:
                for process in running:
                    process.kill()
                    process.join()
        codes = [process.exitcode for process in self.processes]
        return codes, self.log.read_text(encoding="utf-8", errors="replace")


def start_script(script: Path, arguments: Sequence[str], *, ranks: int, folder: Path, timeout: float) -> StartedScript:
    """Start ``script`` on so many ranks, in ``folder``, and return at once."""
    log = folder / f"ranks-{time.monotonic_ns()}.log"
    port = free_port()
    environments = [rank_environment(rank, ranks, port) for rank in range(ranks)]
    processes = start_ranks(script, arguments, environments, folder=folder, log=log)
    return StartedScript(processes, log, time.monotonic() + timeout)


def start_ranks(
    script: Path, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], *, folder: Path, log: Path
) -> list[BaseProcess]:
    """Start ``script`` once in each of these environments, in ``folder``; what they print goes to ``log``."""
    processes = [
        forkserver().Process(target=_run, args=(dict(environment), str(script), list(arguments), str(folder), str(log)))
        for environment in environments
    ]
    for process in processes:
        process.start()
    return processes


def _run(environment: dict[str, str], script: str, arguments: list[str], folder: str, log: str) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.simplefilter("ignore")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
