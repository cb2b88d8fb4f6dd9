"""A script on several ranks without the seconds that importing takes each of them.

Ranks are forked from one process that has imported what they need and done nothing else. What torchrun would give them stands
in their environment; everything else is as if they had been started from a shell.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import runpy
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_GRACE_S = 10.0  # of the other ranks, once one has failed


def forkserver() -> Any:
    """The multiprocessing context whose processes have everything imported."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.rank_imports"])
    return context


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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
    port, log = free_port(), folder / f"ranks-{time.monotonic_ns()}.log"
    processes = [
        forkserver().Process(
            target=_run, args=(rank_environment(rank, ranks, port), str(script), list(arguments), str(folder), str(log))
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    code = 0
    while running := [process for process in processes if process.exitcode is None]:
        wait([process.sentinel for process in running], timeout=max(deadline - time.monotonic(), 0.0))
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed and not code:
            code, deadline = failed[0], min(deadline, time.monotonic() + _GRACE_S)
        if time.monotonic() >= deadline:
            for process in running:
                process.kill()
                process.join()
    output = log.read_text(encoding="utf-8", errors="replace")
    return code or next((process.exitcode for process in processes if process.exitcode), 0), output


def _run(environment: dict[str, str], script: str, arguments: list[str], folder: str, log: str) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.simplefilter("ignore")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
