"""Waiting for what another process or thread does: until it is so, not for a time that is hoped to be enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(answer: Callable[[], T], *, within_s: float, what: str, every_s: float = 0.05) -> T:
    """Ask again and again; the first answer that is true.

    Raises:
        TimeoutError: there was none in ``within_s``. It names ``what`` was waited for.
    """
    deadline = time.monotonic() + within_s
    while not (found := answer()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s:g} s: {what}")
        time.sleep(every_s)
    return found
