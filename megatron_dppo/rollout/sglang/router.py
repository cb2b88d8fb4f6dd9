"""sglang-router in front of the servers: which of them it passes requests on to.

Requests for responses go to its address; it sends those that begin alike to one server, by a memory of what it has sent where
before. All else is asked of the servers themselves, as it knows nothing of pauses, weights and checksums (404).

Tried with sglang-router 0.3.2. It adds and removes servers in the background: 202, and later it is done. It forgets fields of
a request that it does not know, ``return_routed_experts`` among them. It tries again by itself, elsewhere if need be, what a
server fails or refuses with 5xx, so what it answers may come from any of them: every sample's weight version is looked at,
as always.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from megatron_dppo.errors import RefusedRequestError, RolloutError
from megatron_dppo.rollout.sglang.answers import reading
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.transport import Transport

_ASK_AGAIN_S = 0.05
# By itself it names them after their folders, and asks only one kind of server for a request that names none.
_MODEL = "policy"

_log = logging.getLogger(__name__)


class Router:
    """A running router. Used by the rank that owns the servers and by those that ask for responses."""

    def __init__(self, url: str, transport: Transport, config: SGLangConfig) -> None:
        """``url``: its address. It has ``config.control_timeout_s`` to do what it is told, and knows the servers' key."""
        self.url = url.rstrip("/")
        self._transport = transport
        self._api_key = config.keys.api
        self._patience_s = config.control_timeout_s

    async def serve_by(self, urls: Sequence[str]) -> None:
        """Pass requests on to these servers, and to no others. To be called when nobody asks for anything.

        All are added anew: what it remembers of prompts is of no use with caches that an update has emptied, nor is that
        a server once failed too often to be asked. Raises RolloutError if it does not.
        """
        deadline = time.monotonic() + self._patience_s
        await asyncio.gather(*(self._remove(worker) for worker in (await self._workers()).values()))
        await self._until(deadline, [])
        # It would ask for their health itself, and take one whose update lasts for minutes for dead.
        options = {"model_id": _MODEL, "api_key": self._api_key, "disable_health_check": True}
        bodies = [{"url": url, **{k: v for k, v in options.items() if v is not None}} for url in urls]
        await asyncio.gather(*(self._ask("/workers", body) for body in bodies))
        await self._until(deadline, urls)

    async def take_out(self, url: str) -> None:
        """Pass nothing on to this server from now on. Nothing happens if it is not there."""
        worker = (await self._workers()).get(url)
        if worker is not None:
            await self._remove(worker)
            _log.warning("%s was taken out of the router %s", url, self.url)

    async def workers(self) -> list[str]:
        """The servers that it passes requests on to. Raises RolloutError if it does not say."""
        return sorted(await self._workers())

    async def _until(self, deadline: float, urls: Sequence[str]) -> None:
        while (there := await self.workers()) != sorted(urls):
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"the router {self.url} passes requests on to {there or 'nobody'} and not to"
                    f" {sorted(urls) or 'nobody'} {self._patience_s:g} s after it was told to: see its log. A router serves"
                    " one run"
                )
            await asyncio.sleep(_ASK_AGAIN_S)

    async def _remove(self, worker: str) -> None:
        try:
            await self._transport.request(self.url, f"/workers/{worker}", None, self._patience_s, method="DELETE")
        except RefusedRequestError as error:
            if "(404)" not in str(error):  # another replica was faster
                raise

    async def _workers(self) -> dict[str, str]:
        """Address -> what it calls the server."""
        answer = await self._ask("/workers")
        with reading(f"{self.url}/workers"):
            return {str(worker["url"]).rstrip("/"): str(worker["id"]) for worker in answer["workers"]}

    async def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return await self._transport.request(self.url, path, body, self._patience_s)
