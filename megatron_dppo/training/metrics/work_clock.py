"""How long this rank works between two points, by the clock of whatever does the work."""

from __future__ import annotations

import time

import torch


class WorkClock:
    """Adds up the time from ``start`` to ``stop``. Neither waits for a GPU: it notes when it has come there itself."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._started: float | torch.cuda.Event | None = None
        self._spans: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Work begins."""
        self._started = self._now()

    def stop(self) -> None:
        """Work has been given out, or is done; nothing, if it did not begin."""
        if self._started is not None:
            self._spans.append((self._started, self._now()))
            self._started = None

    def take_seconds(self) -> float:
        """Seconds since the last call. **Waits for the device.**"""
        spans, self._spans = self._spans, []
        return sum(_seconds(start, stop) for start, stop in spans)

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(stop, torch.cuda.Event)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000
    assert not isinstance(stop, torch.cuda.Event)
    return stop - start
