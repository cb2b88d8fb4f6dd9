"""Which memory of their devices servers have given up, so that a trainer on the same devices can use it.

A server that is asked to take back what it has not given up ends: SGLang counts as well. On a CPU it does nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from megatron_dppo.errors import RolloutError
from megatron_dppo.rollout.sglang.servers.source import ServerSource
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.sglang.update_calls import UpdateCalls

WEIGHTS = frozenset({"weights"})
EVERYTHING = WEIGHTS | {"kv_cache", "cuda_graph"}

# (url, path, body) -> the answer
Post = Callable[[str, str, dict[str, Any]], Awaitable[Any]]

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
        """Let all servers give up all that they have; nothing is generated any more.

        One that does not is ended, which has the same effect; it is started again before the next update.
        """
        asked = {url: self._transport.submit(self._make_room(url)) for url in self._source.find().urls}
        for url, answer in asked.items():
            try:
                answer.result()
            except RolloutError as error:
                _log.warning("%s is ended, as it does not give its memory up: %s", url, error)
                self.forget(url)
                self._source.end(url)

    async def _make_room(self, url: str) -> None:
        calls = UpdateCalls([url], self._transport, lambda: self._control_timeout_s)
        await calls.pause()
        await self.give_up(calls.post, url)

    def forget(self, url: str) -> None:
        """What had this address has ended."""
        self._given_up.pop(url, None)

    async def give_up(self, post: Post, url: str) -> None:
        """Let a server give up all that it has. It must be paused, and without any request."""
        wanted = EVERYTHING - self._given_up.get(url, frozenset())
        if wanted:
            await post(url, "/release_memory_occupation", {"tags": sorted(wanted)})
            self._given_up[url] = EVERYTHING

    async def take_back(self, post: Post, url: str, tags: frozenset[str] = EVERYTHING) -> None:
        """Let a server have these again. What was in them is lost."""
        given_up = self._given_up.get(url, frozenset())
        if given_up & tags:
            await post(url, "/resume_memory_occupation", {"tags": sorted(given_up & tags)})
            self._given_up[url] = given_up - tags
