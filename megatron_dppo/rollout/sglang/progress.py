"""Whether servers get on with what they were asked, and how loaded they are meanwhile.

A long response on a loaded server is no failure; a server that generates nothing is one. So requests are not held against
their total time, but against the time since their server last made progress.

Behind a router nobody knows which server has a request. There, a server that has nothing to do is no failure, and when one
stalls all requests are taken elsewhere: those that it does not have too.
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
    stalled: asyncio.Future[str]
    watcher: asyncio.Task[None] | None = None  # runs from the first request to the end of the call
    last_progress: float = 0.0
    in_flight: int = 0
    numbers: list[dict[str, Any]] | None = None  # as last reported
    unreported: str = ""  # why its numbers cannot be had
    is_left_out: bool = False
    queue_depth_max: int | None = None
    tokens: int = 0


class ProgressWatch:
    """Watches servers during one ``generate`` call: ``async with ProgressWatch(...) as watch: await watch.answer(...)``.

    A server makes progress when a number of its ``GET /v1/loads`` changes (its timestamp is none) or a response is complete
    (``completed``). A server without that endpoint makes progress by complete responses alone: there, ``timeout_s`` has to be
    longer than the longest response takes.
    """

    def __init__(
        self,
        transport: _Asks,
        urls: Iterable[str],
        *,
        timeout_s: float,
        control_timeout_s: float,
        router: str | None = None,
    ) -> None:
        """How the servers at ``urls`` are asked and watched.

        Args:
            transport: asks the servers.
            urls: the servers that may be asked during the call.
            timeout_s: seconds without progress after which the requests on a server fail.
            control_timeout_s: seconds that a server has to report its load; then it is asked again.
            router: address that all requests are sent to, if it is not the servers' own.
        """
        self._transport = transport
        self._urls = list(urls)
        self._timeout_s = timeout_s
        self._control_timeout_s = control_timeout_s
        self._poll_every_s = min(_POLL_EVERY_S, timeout_s / _POLLS_PER_TIMEOUT)
        self._servers: dict[str, _Server] = {}
        self._router = router
        self._stalled_behind_router: asyncio.Future[str] | None = None  # which
        self._tokens_by_router = 0
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
        """The answer to ``request``, which is sent to ``url``. Raises TransientServerError if that server stalls before.

        If ``url`` is the router's: if any server stalls before.
        """
        servers = self._behind(url)
        for name, server in servers.items():
            if server.in_flight == 0:
                server.last_progress = _now()
            server.in_flight += 1
            if server.watcher is None:
                server.watcher = asyncio.ensure_future(self._watch(name, server))
        stalled = self._stall_of(url)
        asked = asyncio.ensure_future(request)
        try:
            await asyncio.wait((asked, stalled), return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise TransientServerError(self._reason(stalled.result()))
            return asked.result()
        finally:
            for server in servers.values():
                server.in_flight -= 1
            asked.cancel()  # the server drops a request whose connection ends

    def completed(self, url: str, tokens: int) -> None:
        """A response of so many tokens came from ``url``."""
        if url == self._router:
            self._tokens_by_router += tokens
            for server in self._servers.values():
                if server.unreported:  # it may have been this one
                    server.last_progress = _now()
            return
        server = self._servers[url]
        server.last_progress = _now()
        server.tokens += tokens

    def leave_out(self, url: str) -> None:
        """The router asks this server no more, and what it still has is taken elsewhere."""
        server = self._servers[url]
        if not server.is_left_out:
            server.is_left_out = True
            self._stall(url, server)

    def loads(self) -> Mapping[str, ServerLoad]:
        """By url, the load of every server from the start of the call to its end; of a router, that of all behind it.

        For after the call.
        """
        seconds = self._ended - self._started
        if self._router is not None:
            depths = [s.queue_depth_max for s in self._servers.values() if s.queue_depth_max is not None]
            tokens_per_s = self._tokens_by_router / seconds if seconds else 0.0
            return {self._router: ServerLoad(max(depths, default=None), tokens_per_s)}
        return {
            url: ServerLoad(server.queue_depth_max, server.tokens / seconds if seconds else 0.0)
            for url, server in self._servers.items()
        }

    def _behind(self, url: str) -> dict[str, _Server]:
        return self._servers if url == self._router else {url: self._servers[url]}

    def _stall_of(self, url: str) -> asyncio.Future[str]:
        """Done, with a server's address, when what was sent to ``url`` is to be taken elsewhere."""
        if url != self._router:
            return self._servers[url].stalled
        if self._stalled_behind_router is None:
            self._stalled_behind_router = _future()
        return self._stalled_behind_router

    def _stall(self, url: str, server: _Server) -> None:
        server.stalled.set_result(url)
        server.stalled = _future()
        if self._stalled_behind_router is not None:
            self._stalled_behind_router.set_result(url)
            self._stalled_behind_router = None

    def _reason(self, url: str) -> str:
        reason = f"{url} made no progress for request_timeout_s = {self._timeout_s:g} s: no token, no complete response"
        unreported = self._servers[url].unreported
        if unreported:
            reason += f" (only complete responses were counted, since its load cannot be had: {unreported})"
        return reason

    async def _watch(self, url: str, server: _Server) -> None:
        while not server.is_left_out:
            if server.in_flight and not server.unreported:
                await self._look(url, server)
            if (
                self._is_over
            ):  # being cancelled is not enough: asyncio.wait_for forgets it if its own end comes at that moment
                return
            if server.in_flight and _now() - server.last_progress >= self._timeout_s:
                self._stall(url, server)
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
                is_idle = self._router is not None and not (
                    queue_depth or any(load["num_running_reqs"] for load in numbers)
                )
            if not numbers:
                raise RolloutError(f"{url + LOADS_PATH} reports no scheduler")
        except TransientServerError:
            return
        except RolloutError as error:
            server.unreported = str(error)
            return
        if is_idle or (server.numbers is not None and numbers != server.numbers):
            server.last_progress = _now()
        server.numbers = numbers
        server.queue_depth_max = max(queue_depth, server.queue_depth_max or 0)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _future() -> asyncio.Future[str]:
    return asyncio.get_running_loop().create_future()
