"""Requests to end a run in good order: signals and the allotted time.

Each leaves a note. It travels in the next exchange, so all ranks end the step that they are in, write a checkpoint and say
that the run is to be started again. Where a signal asks, responses that servers are being waited for are given up too, as
they may take longer than whoever asks has patience. A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from megatron_dppo.distributed.notice import Notice

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SIGUSR1: Slurm's warning before the time is up
_NO_SIGNAL = 0


class StopRequests:
    """Notes the signals that this process gets while it is entered. For the main thread.

    A thread notes them too: the interpreter runs a handler between two instructions of the main thread, which may be waiting
    for other ranks, who wait for responses.

    Args:
        max_seconds: after so many a stop is requested; 0: no limit.
    """

    def __init__(self, max_seconds: float = 0.0) -> None:
        self._max_seconds = max_seconds
        self._started = time.monotonic()
        self._received: str | None = None
        self._handled_one = False
        self._notice: Notice | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop; None: go on."""
        if self.signal is not None:
            return self.signal
        if self._max_seconds and time.monotonic() - self._started >= self._max_seconds:
            return f"run.max_seconds = {self._max_seconds:g} are over"
        return None

    @property
    def signal(self) -> str | None:
        """The signal that this rank has got or, once shared, any rank. From any thread."""
        return self._received or (None if self._notice is None else self._notice.read())

    def share(self, notice: Notice) -> None:
        """Let all ranks know of the signals of each."""
        self._notice = notice
        self._tell()

    def __enter__(self) -> StopRequests:
        self._signals, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._watch, name="stop-requests", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._wake.send(bytes([_NO_SIGNAL]))
        self._thread.join()
        self._wake.close()
        self._signals.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._handled_one:
            raise KeyboardInterrupt
        self._handled_one = True
        self._receive(number)

    def _watch(self) -> None:
        while True:
            for number in self._signals.recv(64):
                if number == _NO_SIGNAL:
                    return
                if number in _SIGNALS:  # the process may have handlers for others
                    self._receive(number)

    def _receive(self, number: int) -> None:
        if self._received is None:
            self._received = signal.Signals(number).name
            self._tell()

    def _tell(self) -> None:
        if self._notice is not None and self._received is not None:
            self._notice.leave(self._received)
