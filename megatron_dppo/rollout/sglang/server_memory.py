"""Which memory of their devices servers have given up, so that a trainer on the same devices can use it.

A server that is asked to take back what it has not given up ends: SGLang counts as well. On a CPU it does nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from megatron_dppo.errors import RolloutError
from megatron_dppo.rollout.sglang.servers.source import ServerSource
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.sglang.update_calls import UpdateCalls

WEIGHTS = frozenset({"weights"})
EVERYTHING = WEIGHTS | {"kv_cache", "cuda_graph"}

_log = logging.getLogger(__name__)


class ServerMemory:
    """Of the servers of a source, by url. All of it is theirs when they start. Used by the one rank that owns them."""

    def __init__(self, source: ServerSource, transport: Transport, control_timeout_s: float) -> None:
        """``control_timeout_s``: for each call of ``make_room``."""
        self._source = source
        self._transport = transport
        self._control_timeout_s = control_timeout_s
        self._given_up: dict[str, frozenset[str]] = {}

    def make_room(self) -> None:
        """Let all servers rest. One that does not is ended, which gives as much room; it is started again later."""
        urls = self._source.find().urls
        asked = {url: self._transport.submit(self.rest(url, lambda: self._control_timeout_s)) for url in urls}
        for url, answer in asked.items():
            try:
                answer.result()
            except RolloutError as error:
                _log.warning("%s is ended, as it does not give its memory up: %s", url, error)
                self.forget(url)
                self._source.end(url)

    def forget(self, url: str) -> None:
        """What had this address has ended."""
        self._given_up.pop(url, None)

    async def rest(self, url: str, time_left: Callable[[], float]) -> None:
        """Let a server give up all that it has. It is paused from then on."""
        wanted = EVERYTHING - self._given_up.get(url, frozenset())
        if wanted:
            calls = UpdateCalls([url], self._transport, time_left)
            await calls.pause()
            await calls.post(url, "/release_memory_occupation", {"tags": sorted(wanted)})
            self._given_up[url] = EVERYTHING

    async def take_back(self, url: str, time_left: Callable[[], float], tags: frozenset[str] = EVERYTHING) -> None:
        """Let a server have these again. What was in them is lost."""
        given_up = self._given_up.get(url, frozenset())
        if given_up & tags:
            calls = UpdateCalls([url], self._transport, time_left)
            await calls.post(url, "/resume_memory_occupation", {"tags": sorted(given_up & tags)})
            self._given_up[url] = given_up - tags
