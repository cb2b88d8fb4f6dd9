"""Waiting within a weight update: for anything, but no longer than a server, another rank or the clock allows.

When servers fail, the update may begin anew without them, with the same ranks. So what ranks have begun among themselves they
finish then, all of them: a message that is left would be taken for one of the next update.
"""

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
# After the time of an update: a server that does not answer is found first by who asked it, and not by ranks that wait.
_GRACE_S = 5.0


class ServersFailed(WeightSyncError):  # noqa: N818  what happened, not what is raised
    """A server has failed, or refused something; no rank has."""


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

    def time_left(self, grace_s: float = 0.0) -> float:
        """Seconds until so long after the time of the update. Raises WeightSyncError if there are none."""
        left = self._deadline + grace_s - time.monotonic()
        if left <= 0:
            raise WeightSyncError(
                f"the weight update of {self._urls} took longer than sync_timeout_s = {self._limit_s:g} s"
            )
        return left

    def until(self, done: Callable[[], bool]) -> None:
        """Return when it is so. Raises ServersFailed, or for another rank and the clock WeightSyncError, if it cannot be."""
        self._until(done, self._look_at_servers)

    def until_ranks(self, done: Callable[[], bool]) -> None:
        """The same for what is the ranks' alone: it is finished whatever becomes of servers."""
        self._until(done, lambda: None)

    def _until(self, done: Callable[[], bool], look_at_servers: Callable[[], Exception | None]) -> None:
        look = 0.0
        while not done():
            self.time_left(_GRACE_S)
            if time.monotonic() > look:
                look = time.monotonic() + _LOOK_FOR_FAILURES_S
                failed = look_at_servers()
                if failed is not None and not done():  # it may have become so before they failed
                    raise failed
                if self.meeting is not None and (failure := self.meeting.failure()) is not None:
                    raise WeightSyncError(failure)
            time.sleep(_POLL_S)

    def check_servers(self) -> None:
        """Raise ServersFailed if they have."""
        if (failed := self._look_at_servers()) is not None:
            raise failed

    def _look_at_servers(self) -> Exception | None:
        if self.driver is not None and self.driver.done() and (error := self.driver.exception()) is not None:
            failed = ServersFailed(f"{error}")
            failed.__cause__ = error
            return failed
        failure = None if self.meeting is None else self.meeting.failure_of_servers()
        return None if failure is None else ServersFailed(failure)

    def wait(self, work: dist.Work) -> None:
        """Wait for what servers have a part in."""
        self._wait(work, self.until)

    def wait_for_ranks(self, work: dist.Work) -> None:
        """Wait for what other ranks alone have a part in."""
        self._wait(work, self.until_ranks)

    def _wait(self, work: dist.Work, until: Callable[[Callable[[], bool]], None]) -> None:
        if self._on_gpu:
            until(work.is_completed)
            work.wait()
            return
        # Gloo's messages are not complete before they are waited for.
        waiting = in_background(work.wait)
        until(waiting.done)
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
