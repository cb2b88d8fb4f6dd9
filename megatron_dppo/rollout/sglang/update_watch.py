"""Waiting within a weight update: for anything, but no longer than a server, another rank or the clock allows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_dppo.errors import WeightSyncError
from megatron_dppo.rollout.sglang.update_meeting import Meeting

T = TypeVar("T")

_POLL_S = 0.002
_LOOK_FOR_FAILURES_S = 0.2


class UpdateWatch:
    """Of one rank.

    Attributes:
        meeting: where other ranks' failures are read, once there is one.
        driver: what talks to the servers, on the rank that does.
    """

    def __init__(self, urls: Sequence[str], on_gpu: bool) -> None:
        """``on_gpu``: what is waited for runs on one."""
        self.meeting: Meeting | None = None
        self.driver: Future[None] | None = None
        self._urls = list(urls)
        self._on_gpu = on_gpu
        self._limit_s = 0.0
        self._deadline = 0.0

    def start(self, limit_s: float) -> None:
        """Let the time of an update begin."""
        self._limit_s = limit_s
        self._deadline = time.monotonic() + limit_s

    def time_left(self) -> float:
        """Seconds. Raises WeightSyncError if there are none."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise WeightSyncError(
                f"the weight update of {self._urls} took longer than sync_timeout_s = {self._limit_s:g} s"
            )
        return left

    def until(self, done: Callable[[], bool]) -> None:
        """Return when it is so. Raises what ended the driver, else WeightSyncError, if something fails first."""
        look = time.monotonic()
        while not done():
            if self.driver is not None and self.driver.done():
                self.driver.result()
            self.time_left()
            if time.monotonic() > look:
                look = time.monotonic() + _LOOK_FOR_FAILURES_S
                if self.meeting is not None and (failure := self.meeting.failure()) is not None:
                    raise WeightSyncError(failure)
            time.sleep(_POLL_S)

    def wait(self, work: dist.Work) -> None:
        """Wait for what other processes have a part in."""
        if self._on_gpu:
            self.until(work.is_completed)
            work.wait()
            return
        # Gloo's messages are not complete before they are waited for.
        waiting = in_background(work.wait)
        self.until(waiting.done)
        try:
            waiting.result()
        except RuntimeError as error:
            raise WeightSyncError(f"sending weights to {self._urls} failed: {error}") from error


def in_background(action: Callable[[], T]) -> Future[T]:
    """Run it in a thread that ends with the process: what waits for others may never return."""
    future: Future[T] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="weight-sync", daemon=True).start()
    return future
