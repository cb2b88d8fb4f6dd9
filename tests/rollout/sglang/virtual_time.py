"""Servers that take hours in no time: a transport whose event loop jumps from one timer to the next."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from megatron_dppo.errors import TransientServerError


class _Clock(selectors.SelectSelector):
    """What an event loop waits with. Instead of waiting, the time that it keeps goes on."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "no timer is set and nothing else can happen: this would wait for ever"
        self.now += max(0.0, timeout)
        return super().select(0)


class _VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def steady(now: float) -> list[dict[str, Any]]:
    """What /v1/loads reports of a server that generates a token a second."""
    return [{"timestamp": now, "num_running_reqs": 1, "num_waiting_reqs": 0, "num_used_tokens": int(now)}]


def idle(now: float) -> list[dict[str, Any]]:
    """What /v1/loads reports of a server that has nothing to do."""
    return [{"timestamp": now, "num_running_reqs": 0, "num_waiting_reqs": 0, "num_used_tokens": 0}]


@dataclass
class FakeServer:
    """Times are seconds of the loop.

    Attributes:
        response_s: how long the responses take, one after another as they are asked for; the last one stands for the rest.
        hangs_from: when it stops to generate anything: numbers stay (timestamps do not), and what is asked is lost.
        silent: then no call at all is answered.
        loads: by the time, the ``loads`` that it reports; or raises.
        asked: when responses were asked for.
    """

    response_s: tuple[float, ...] = (1.0,)
    hangs_from: float = math.inf
    silent: bool = False
    loads: Callable[[float], Any] = steady
    asked: list[float] = field(default_factory=list)

    async def answer(self, path: str, body: dict[str, Any] | None) -> Any:
        loop = asyncio.get_running_loop()
        now = loop.time()
        hangs = now >= self.hangs_from
        if hangs and (self.silent or not path.startswith("/v1/loads")):
            await loop.create_future()
        if path.startswith("/v1/loads"):
            loads = self.loads(min(now, self.hangs_from))
            return {"loads": [{**load, "timestamp": now} for load in loads] if isinstance(loads, list) else loads}
        if body is not None:
            takes_s = self.response_s[min(len(self.asked), len(self.response_s) - 1)]
            self.asked.append(now)
            await asyncio.sleep(takes_s)
            if loop.time() >= self.hangs_from:
                await loop.create_future()
            return response_of(body["sampling_params"]["max_new_tokens"])
        return ""


def response_of(tokens: int) -> dict[str, Any]:
    """A whole response of weights 1, as SGLang 0.5.23 answers (fields that are not read left out)."""
    return {
        "output_ids": [11] * tokens,
        "meta_info": {
            "finish_reason": {"type": "length", "length": tokens},
            "output_token_logprobs": [[-0.5, 11, None]] * tokens,
            "weight_versions": [{"version": "1", "start": 0, "end": tokens}],
        },
    }


class FakeRouter:
    """Passes what it is asked on to one of ``workers`` after the other."""

    def __init__(self, servers: Mapping[str, FakeServer]) -> None:
        self._servers = servers
        self.workers = list(servers)
        self._asked = 0

    async def answer(self, path: str, body: dict[str, Any] | None) -> Any:
        if path == "/workers":
            return {"workers": [{"url": url, "id": url} for url in self.workers]}
        if path.startswith("/workers/"):
            self.workers.remove(path.removeprefix("/workers/"))
            return ""
        self._asked += 1
        return await self._servers[self.workers[self._asked % len(self.workers)]].answer(path, body)


class VirtualTimeTransport:
    """A ``Transport`` to fake servers."""

    def __init__(self, servers: Mapping[str, FakeServer | FakeRouter]) -> None:
        self.loop = _VirtualTimeLoop()
        self._servers = servers

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self.loop.run_until_complete(coroutine))
        return future

    async def request(
        self, url: str, path: str, body: dict[str, Any] | None, timeout_s: float, method: str | None = None
    ) -> Any:
        try:
            return await asyncio.wait_for(self._servers[url].answer(path, body), timeout_s)
        except asyncio.TimeoutError as error:
            raise TransientServerError(f"{url}{path} did not answer within {timeout_s:g} s") from error

    async def in_thread(self, action: Callable[[], Any]) -> Any:
        return action()

    def close(self) -> None:
        self.loop.close()
