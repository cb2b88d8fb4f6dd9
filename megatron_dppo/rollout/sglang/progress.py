"""Whether servers get on with what they were asked, and how loaded they are meanwhile.

A long response on a loaded server is no failure; a server that generates nothing is one. So requests are not held against
their total time, but against the time since their server last made progress.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar

from megatron_dppo.errors import RolloutError, TransientServerError
from megatron_dppo.rollout.engine import ServerLoad
from megatron_dppo.rollout.sglang.answers import reading

T = TypeVar("T")

# The numbers of SGLang's schedulers, written by each of them after every prefill and every 15 decoding steps
# (--load-snapshot-publish-interval), and by an idle one too. They come out of shared memory: asking disturbs no batch.
LOADS_PATH = "/v1/loads?include=core"
_POLL_EVERY_S = 2.0
_POLLS_PER_TIMEOUT = 10


class _Asks(Protocol):
    """What is needed of a ``Transport``."""

    async def request(self, url: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any: ...


@dataclass
class _Server:
    """What is known of one server; times are those of the event loop, in seconds."""

    # Done when the requests in flight are to be taken elsewhere; then another takes its place.
    stalled: asyncio.Future[None]
    watcher: asyncio.Task[None] | None = None  # runs from the first request to the end of the call
    last_progress: float = 0.0
    in_flight: int = 0
    numbers: list[dict[str, Any]] | None = None  # as last reported
    unreported: str = ""  # why its numbers cannot be had
    queue_depth_max: int | None = None
    tokens: int = 0


class ProgressWatch:
    """Watches servers during one ``generate`` call: ``async with ProgressWatch(...) as watch: await watch.answer(...)``.

    A server makes progress when a number of its ``GET /v1/loads`` changes (its timestamp is none) or a response is complete
    (``completed``). A server without that endpoint makes progress by complete responses alone: there, ``timeout_s`` has to be
    longer than the longest response takes.
    """

    def __init__(self, transport: _Asks, urls: Iterable[str], *, timeout_s: float, control_timeout_s: float) -> None:
        """How the servers at ``urls`` are asked and watched.

        Args:
            transport: asks the servers.
            urls: the servers that may be asked during the call.
            timeout_s: seconds without progress after which the requests on a server fail.
            control_timeout_s: seconds that a server has to report its load; then it is asked again.
        """
        self._transport = transport
        self._urls = list(urls)
        self._timeout_s = timeout_s
        self._control_timeout_s = control_timeout_s
        self._poll_every_s = min(_POLL_EVERY_S, timeout_s / _POLLS_PER_TIMEOUT)
        self._servers: dict[str, _Server] = {}
        self._started = self._ended = 0.0
        self._is_over = False

    async def __aenter__(self) -> ProgressWatch:
        self._started = _now()
        self._servers = {url: _Server(stalled=_future()) for url in self._urls}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended, self._is_over = _now(), True
        watchers = [server.watcher for server in self._servers.values() if server.watcher is not None]
        for watcher in watchers:
            watcher.cancel()
        for outcome in await asyncio.gather(*watchers, return_exceptions=True):
            # A watcher that ended by itself has watched nothing since.
            if isinstance(outcome, Exception) and error is None:
                raise outcome

    async def answer(self, url: str, request: Coroutine[Any, Any, T]) -> T:
        """The answer to ``request``, which is sent to ``url``. Raises TransientServerError if that server stalls before."""
        server = self._servers[url]
        if server.in_flight == 0:
            server.last_progress = _now()
        server.in_flight += 1
        if server.watcher is None:
            server.watcher = asyncio.ensure_future(self._watch(url, server))
        stalled = server.stalled
        asked = asyncio.ensure_future(request)
        try:
            await asyncio.wait((asked, stalled), return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise TransientServerError(self._reason(url))
            return asked.result()
        finally:
            server.in_flight -= 1
            asked.cancel()  # the server drops a request whose connection ends

    def completed(self, url: str, tokens: int) -> None:
        """A response of so many tokens came from ``url``."""
        server = self._servers[url]
        server.last_progress = _now()
        server.tokens += tokens

    def loads(self) -> Mapping[str, ServerLoad]:
        """By url, the load of every server from the start of the call to its end. For after the call."""
        seconds = self._ended - self._started
        return {
            url: ServerLoad(server.queue_depth_max, server.tokens / seconds if seconds else 0.0)
            for url, server in self._servers.items()
        }

    def _reason(self, url: str) -> str:
        reason = f"{url} made no progress for request_timeout_s = {self._timeout_s:g} s: no token, no complete response"
        unreported = self._servers[url].unreported
        if unreported:
            reason += f" (only complete responses were counted, since its load cannot be had: {unreported})"
        return reason

    async def _watch(self, url: str, server: _Server) -> None:
        while True:
            if server.in_flight and not server.unreported:
                await self._look(url, server)
            if (
                self._is_over
            ):  # being cancelled is not enough: asyncio.wait_for forgets it if its own end comes at that moment
                return
            if server.in_flight and _now() - server.last_progress >= self._timeout_s:
                server.stalled.set_result(None)
                server.stalled = _future()
            await asyncio.sleep(self._poll_every_s)

    async def _look(self, url: str, server: _Server) -> None:
        """Ask for the server's load, and compare it with the last one."""
        left_s = server.last_progress + self._timeout_s - _now()
        limit_s = max(self._poll_every_s, min(self._control_timeout_s, left_s))
        try:
            answer = await self._transport.request(url, LOADS_PATH, None, limit_s)
            with reading(url + LOADS_PATH):
                numbers = [{**load, "timestamp": None} for load in answer["loads"]]
                queue_depth = sum(int(load["num_waiting_reqs"]) for load in numbers)
            if not numbers:
                raise RolloutError(f"{url + LOADS_PATH} reports no scheduler")
        except TransientServerError:
            return
        except RolloutError as error:
            server.unreported = str(error)
            return
        if server.numbers is not None and numbers != server.numbers:
            server.last_progress = _now()
        server.numbers = numbers
        server.queue_depth_max = max(queue_depth, server.queue_depth_max or 0)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()
