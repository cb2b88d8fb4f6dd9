"""The servers that there are, wherever they come from, and which of them can be updated now.

Before the first update all that are expected have to be there. Later a server that does not answer is left out, and comes
back with the first update that finds it again, as one that is new does: it has no weights of ours then, and gets them,
verified, like all others. Nobody waits for it, unless without it there are too few.
"""

from __future__ import annotations

import concurrent.futures
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_dppo.errors import RolloutError, StoppedWaitingError
from megatron_dppo.rollout.sglang.answers import reading
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.servers.source import Found, ServerSource
from megatron_dppo.rollout.sglang.transport import Transport

_ASK_AGAIN_S = 0.5
_SAY_SO_EVERY_S = 30.0
# For a server that did not answer last time: where its host is gone, no answer comes at all, and an update would wait for it.
_TO_ANSWER_AGAIN_S = 2.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """The servers that can be updated.

    Attributes:
        urls: their addresses.
        newcomers: those among them that do not serve the weights of the last update: they are new, or were started again.
    """

    urls: tuple[str, ...]
    newcomers: frozenset[str]


@dataclass(frozen=True)
class _Look:
    """What one look at all servers has shown: who serves which version, why others do not say, and who is yet to come."""

    labels: dict[str, str]
    silent: dict[str, str]
    found: Found

    def missing(self) -> str:
        return "; ".join([*self.silent.values(), *self.found.awaited, *self.found.failures])


class ServerPool:
    """Used by the one rank that owns the servers."""

    def __init__(
        self,
        config: SGLangConfig,
        transport: Transport,
        source: ServerSource,
        stop: Callable[[], str | None] = lambda: None,
    ) -> None:
        """``source`` says which servers there are; it is closed with the pool.

        ``stop`` is asked while servers are waited for: why the run is to stop, or None.
        """
        self._stop = stop
        self._config = config
        self._transport = transport
        self._source = source
        self._silent_since: dict[str, float] = {}  # those that did not answer when last asked, and when that began

    def prepare(self) -> None:
        """Start the servers, or wait for those that others start.

        Raises RolloutError if one is not ready in time, StoppedWaitingError if the run is to stop meanwhile.
        """
        self._source.start()
        deadline, said = self._deadline(), time.monotonic()
        while True:
            look = self._look()
            if look.found.failures:
                raise RolloutError("\n".join(look.found.failures))
            if len(look.labels) >= self._source.expected:
                return
            if time.monotonic() > deadline:
                limit = self._config.startup_timeout_s
                raise RolloutError(
                    f"{self._count(look)} were ready after startup_timeout_s = {limit:g} s; missing: {look.missing()}"
                )
            said = self._wait(look, said)

    def fit(self, version: int) -> Fit:
        """Find out who can be updated, after ``version`` was the last update. Started servers that ended start again.

        Raises:
            RolloutError: they are fewer than ``config.fewest_servers``, and no more have come within
                ``startup_timeout_s``, or none will; those that are missing are named.
            StoppedWaitingError: the run is to stop meanwhile.
        """
        self._source.start()
        deadline, said = self._deadline(), time.monotonic()
        fewest = self._config.fewest_servers
        looked_again = False
        while len((look := self._look()).labels) < fewest:
            if not look.found.awaited and not looked_again:  # one may have ended since those that had were started
                looked_again = True
                time.sleep(_ASK_AGAIN_S)
                self._source.start()
                if self._source.find().awaited:
                    continue
            if not look.found.awaited or time.monotonic() > deadline:
                raise RolloutError(
                    f"{self._count(look)} answer, fewer than min_servers = {fewest}; missing: {look.missing()}"
                )
            said = self._wait(look, said)
        for reason in [*look.silent.values(), *look.found.awaited, *look.found.failures]:
            _log.warning("left out of this update: %s", reason)
        return Fit(tuple(look.labels), frozenset(url for url, label in look.labels.items() if label != str(version)))

    def silent(self, urls: Iterable[str]) -> dict[str, str]:
        """Those that do not answer now, and why."""
        return self._labels(urls)[1]

    def close(self) -> None:
        """End the servers that were started. Safe to call twice."""
        self._source.close()

    def _deadline(self) -> float:
        return time.monotonic() + self._config.startup_timeout_s

    def _wait(self, look: _Look, said: float) -> float:
        """A little, and report what for, now and then; returns when that was last done."""
        if (reason := self._stop()) is not None:
            raise StoppedWaitingError(f"stopped while waiting for servers ({reason}); missing: {look.missing()}")
        time.sleep(_ASK_AGAIN_S)
        if time.monotonic() - said < _SAY_SO_EVERY_S:
            return said
        _log.warning("%s are ready; waiting for %s", self._count(look), look.missing())
        return time.monotonic()

    def _count(self, look: _Look) -> str:
        servers = max(self._source.expected, len(look.found.urls))
        return f"{len(look.labels)} of {servers} SGLang servers"

    def _look(self) -> _Look:
        found = self._source.find()
        labels, silent = self._labels(found.urls)
        hung = [url for url in silent if time.monotonic() - self._silent_since[url] > self._config.hang_timeout_s]
        if hung:
            for url in hung:
                self._source.end(url)
            self._source.start()
            found = self._source.find()
        return _Look(labels, silent, found)

    def _labels(self, urls: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """(url -> the version that a server says it serves, url -> why a server does not say)."""
        asked = {
            url: self._transport.submit(self._transport.request(url, "/model_info", None, self._patience_with(url)))
            for url in urls
        }
        concurrent.futures.wait(asked.values())
        labels, silent = {}, {}
        for url, answer in asked.items():
            try:
                info = answer.result()
                with reading(f"{url}/model_info"):
                    labels[url] = str(info["weight_version"])
            except RolloutError as error:
                silent[url] = str(error)
        now = time.monotonic()
        self._silent_since = {url: self._silent_since.get(url, now) for url in silent}
        return labels, silent

    def _patience_with(self, url: str) -> float:
        limit = self._config.control_timeout_s
        return min(limit, _TO_ANSWER_AGAIN_S) if url in self._silent_since else limit
