"""Reward functions that misbehave, named by dotted path in test_scoring.py."""

from __future__ import annotations

import os
import re
import subprocess
import time
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
    if order == "sleep":
        time.sleep(float(argument))
    if order == "backtrack":  # hangs in C code that holds the GIL: no signal handler and no other thread can run
        re.match(r"(a+)+$", "a" * 60 + "b")
    if order == "spawn":  # starts a process, writes down its id, and hangs
        child = subprocess.Popen(["sleep", "300"])
        Path(argument).write_text(str(child.pid))
        time.sleep(300)
    return 1.0


def needs_other_arguments(sample: Any) -> float:
    return 1.0


not_a_function = 3
