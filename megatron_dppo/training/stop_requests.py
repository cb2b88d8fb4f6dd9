"""Requests to end a run in good order: signals and the allotted time.

A signal only leaves a note. It travels in the next exchange, so all ranks end the step that they are in, write a checkpoint
and say that the run is to be started again. A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SIGUSR1: Slurm's warning before the time is up


class StopRequests:
    """Notes the signals that this process gets while it is entered. For the main thread.

    Args:
        max_seconds: after so many a stop is requested; 0: no limit.
    """

    def __init__(self, max_seconds: float = 0.0) -> None:
        self._max_seconds = max_seconds
        self._started = time.monotonic()
        self._received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop; None: go on."""
        if self._received is not None:
            return self._received
        if self._max_seconds and time.monotonic() - self._started >= self._max_seconds:
            return f"run.max_seconds = {self._max_seconds:g} are over"
        return None

    def __enter__(self) -> StopRequests:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if received is signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        self._received = received.name
