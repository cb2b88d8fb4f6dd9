"""Every rank of every node ends soon after the first that failed, whatever it is waiting for.

A rank that fails leaves the others in collectives that never end: NCCL gives up after half an hour, and torchrun's agents on
other nodes hear of it late or never. So each rank has a thread that looks into the store where the ranks met: for a note that
one has failed, and for signs of life of the next rank, as one that was killed leaves no note.

A rank whose connection to another one breaks has not failed: the other one has, and the thread knows which and why.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from torch.distributed import DistBackendError

from megatron_dppo.distributed.notice import connect_to_store, start_key
from megatron_dppo.errors import StopRequested

EXIT_ANOTHER_FAILED = 4  # of a rank that ends because another has failed

_EVERY_S = 1.0
_SILENCE_S = 20.0  # without a sign of life, a rank is taken to be dead
_GRACE_S = 3.0  # for a rank to meet the same failure by itself
_CLEAN_UP_S = 10.0  # for a rank that has failed to end what it started
_LEFT = b"left"
_BROKEN_CONNECTION = ("gloo/transport", "ncclRemoteError")  # in the messages; none of them has a class of its own


class Lifeline:
    """Entered by all ranks when they have met; left without an error when all of them are done.

    Args:
        rank: this one.
        world_size: how many there are; alone there is nothing to do.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._next = rank, (rank + 1) % world_size
        self._is_alone = world_size == 1
        self._ends_by_itself = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)

    def __enter__(self) -> Lifeline:
        if not self._is_alone:
            self._store = connect_to_store()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_alone:
            return
        if error is not None:
            self._tell(error)
            return
        self._ends_by_itself.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # whose store it is may have left already
            self._store.set(self._key("sign", self._rank), _LEFT.decode())

    @contextmanager
    def told_first(self) -> Iterator[None]:
        """Within: an error is told to the other ranks before anything is taken down, which may wait for them for ever."""
        try:
            yield
        except StopRequested:
            raise
        except BaseException as error:
            if not self._is_alone:
                self._tell(error)
            raise

    def _tell(self, error: BaseException) -> None:
        if self._ends_by_itself.is_set():
            return
        if _is_of_a_connection(error):  # another rank is gone; the thread ends this process as soon as it knows why
            time.sleep(_SILENCE_S + _GRACE_S + 3 * _EVERY_S)
        self._ends_by_itself.set()
        reason = f"rank {self._rank} failed with {type(error).__name__}: {error}"
        deadline = threading.Timer(_CLEAN_UP_S, _exit, args=(f"error: {reason} (its clean-up did not end)", 1))
        deadline.daemon = True
        deadline.start()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # the store went first, which nobody overlooks
            self._store.set(self._key("failed"), reason)

    def _key(self, *parts: object) -> str:
        return start_key("lifeline", *parts)

    def _watch(self) -> None:
        number, last, since = 0, b"", time.monotonic()
        while not self._ends_by_itself.wait(_EVERY_S):
            number += 1
            try:
                self._store.set(self._key("sign", self._rank), str(number))
                if self._store.check([self._key("failed")]):
                    self._end(self._store.get(self._key("failed")).decode())
                of_next = self._key("sign", self._next)
                sign = self._store.get(of_next) if self._store.check([of_next]) else b""
                if sign != last:
                    last, since = sign, time.monotonic()
                elif last != _LEFT and time.monotonic() - since > _SILENCE_S:
                    reason = f"rank {self._next} has given no sign of life for {_SILENCE_S:g} s"
                    self._store.set(self._key("failed"), reason)
                    self._end(reason)
            except RuntimeError as error:  # torch's own errors are RuntimeErrors
                self._end(f"the store of the ranks is gone ({error})")

    def _end(self, reason: str) -> None:
        """End this process, unless it is about to end by itself."""
        if not self._ends_by_itself.wait(_GRACE_S):
            _exit(f"rank {self._rank} ends: {reason}", EXIT_ANOTHER_FAILED)


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


def _is_of_a_connection(error: BaseException) -> bool:
    """Whether ``error`` is what gloo or NCCL says of another rank that has gone."""
    return type(error) in (RuntimeError, DistBackendError) and any(mark in str(error) for mark in _BROKEN_CONNECTION)
