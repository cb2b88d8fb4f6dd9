"""Reward functions that misbehave, named by dotted path in test_scoring.py."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any


def follow_orders(question: str, response: str, answer: str | None, metadata: dict[str, Any]) -> Any:
    """Does what the response says."""
    order, _, argument = response.partition(" ")
    if order == "return":
        return float(argument)
    if order == "text":
        return argument
    if order == "raise":
        raise RuntimeError(argument)
    if order == "quit":
        raise SystemExit(3)
    if order == "die":
        os._exit(3)
    if order == "hang":
        signal.pause()
    if order == "note":
        Path(argument).touch()
    if order == "backtrack":  # hangs in C code that holds the GIL: no signal handler and no other thread can run
        if argument:
            Path(argument).touch()
        re.match(r"(a+)+$", "a" * 60 + "b")
    if order == "spawn":  # starts a process, writes down its id, and hangs
        child = subprocess.Popen(["sleep", "300"])
        Path(argument).write_text(str(child.pid))
        signal.pause()
    return 1.0


def needs_other_arguments(sample: Any) -> float:
    return 1.0


not_a_function = 3
