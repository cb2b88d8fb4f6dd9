"""Which servers hang: their processes are there, and they have not been healthy for long."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from megatron_dppo.rollout.sglang.transport import Transport

_ASK_EVERY_S = 10.0
_ANSWER_WITHIN_S = 60.0  # a server that generates nothing says so after 20 s


class Watchdog:
    """Asks servers for their health again and again, without waiting for them.

    A server is healthy when it generates a token, or is at others (SGLang's ``/health``). One that a trainer has paused is
    not, so the limit has to be longer than a weight update. SGLang itself ends a server whose forward pass does not return;
    not one that waits for another process, is stopped, or does not answer at all.
    """

    def __init__(self, transport: Transport, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``limit_s``: seconds without health after which a server hangs."""
        self._transport = transport
        self._limit_s = limit_s
        self._every_s = min(_ASK_EVERY_S, limit_s / 10)
        self._patience_s = min(_ANSWER_WITHIN_S, limit_s)
        self._clock = clock
        self._healthy_at: dict[str, float] = {}
        self._asked_at: dict[str, float] = {}
        self._asked: dict[str, Future[Any]] = {}

    def hung(self, urls: Sequence[str]) -> list[str]:
        """Those among these servers. Called often; a server that was not among them last time is taken to be healthy."""
        now = self._clock()
        for url in self._healthy_at.keys() - set(urls):
            self._forget(url)
        return [url for url in urls if now - self._seen_healthy(url, now) > self._limit_s]

    @property
    def limit(self) -> str:
        """In words."""
        return f"not healthy for hang_timeout_s = {self._limit_s:g} s"

    def close(self) -> None:
        """Wait for no answer any more."""
        for url in list(self._healthy_at):
            self._forget(url)

    def _seen_healthy(self, url: str, now: float) -> float:
        """When last, after looking whether there is an answer, and asking again."""
        asked = self._asked.get(url)
        if asked is not None and asked.done():
            if asked.exception() is None:
                self._healthy_at[url] = now
            del self._asked[url]
        if url not in self._asked and now - self._asked_at.get(url, -self._every_s) >= self._every_s:
            self._asked_at[url] = now
            self._asked[url] = self._transport.submit(self._transport.request(url, "/health", None, self._patience_s))
        return self._healthy_at.setdefault(url, now)

    def _forget(self, url: str) -> None:
        del self._healthy_at[url]
        self._asked_at.pop(url, None)
        asked = self._asked.pop(url, None)
        if asked is not None:
            asked.cancel()
