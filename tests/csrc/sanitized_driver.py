"""Runs a library's kernels, sanitized or not: the emulated CUDA kernels, or the CPU kernels behind the same interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).with_name("emulation_driver.py")


def library_path(name: str) -> str:
    """Where the compiler keeps one of its libraries."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def asan_environment() -> dict[str, str]:
    """Variables of a process that loads a library compiled with -fsanitize=address."""
    return {
        "LD_PRELOAD": f"{library_path('libasan.so')} {library_path('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        # Every allocation of Python's and numpy's through malloc, so that an array's end is an allocation's end.
        "PYTHONMALLOC": "malloc",
    }


def run_driver(library: Path, *arguments: str, **variables: str) -> tuple[bool, str]:
    """Whether the driver found nothing wrong, and all that was said."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **variables}
    command = [sys.executable, str(DRIVER), str(library), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode == 0, done.stdout + done.stderr
