"""HTTP to the servers: one event loop in a thread of its own, one session, a timeout on every call."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from megatron_dppo.compat.extras import from_extra
from megatron_dppo.errors import RefusedRequestError, TransientServerError
from megatron_dppo.rollout.sglang.keys import ServerKeys

with from_extra("sglang"):
    import aiohttp

T = TypeVar("T")

_LONG_ANSWER = 64 * 1024  # characters


class Transport:
    """Runs coroutines on a background event loop, so that the trainer's thread stays free to broadcast weights."""

    def __init__(self, keys: ServerKeys = ServerKeys()) -> None:  # noqa: B008  it cannot be changed
        """``keys``: for the servers that ask for some."""
        self._keys = keys
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-http", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession | None = None
        # One at a time: what many answers at once would take in memory while they are read.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sglang-reader")

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start ``coroutine`` on the event loop; its result, or exception, arrives in the future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, url: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        """Send one request and wait for the answer (see ``request``)."""
        return self.submit(self.request(url, path, body, timeout_s)).result()

    async def request(
        self, url: str, path: str, body: dict[str, Any] | None, timeout_s: float, method: str | None = None
    ) -> Any:
        """POST ``body`` as JSON, or GET if it is None, unless ``method`` is another; return the decoded answer.

        Raises RefusedRequestError on a 4xx answer and TransientServerError on everything else that goes wrong.
        """
        if self._session is None:
            # A connection for every request: servers close idle ones after seconds, and a request that meets the closing
            # fails although the server is fine. A generation can be tried again, a step of a weight update cannot.
            # Concurrency is bounded by the callers; a limit here would only hide queueing from their timeouts.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method or ("GET" if body is None else "POST"),
                url + path,
                json=body,
                timeout=timeout,
                headers=self._keys.headers(path),
            ) as response:
                status, text = response.status, await response.text()
        except asyncio.TimeoutError as error:
            raise TransientServerError(f"{url}{path} did not answer within {timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise TransientServerError(f"{url}{path} cannot be reached: {error!r}") from error
        if 400 <= status < 500:
            raise RefusedRequestError(f"{url}{path} refused the request ({status}): {text[:1000]}")
        if not 200 <= status < 300:
            raise TransientServerError(f"{url}{path} failed ({status}): {text[:1000]}")
        return await self.in_thread(lambda: _decoded(text)) if len(text) > _LONG_ANSWER else _decoded(text)

    async def in_thread(self, action: Callable[[], T]) -> T:
        """Its result, from a thread that does one thing at a time, while the event loop goes on."""
        return await self._loop.run_in_executor(self._reader, action)

    def close(self) -> None:
        """Close the session and end the thread. Safe to call twice."""
        if self._loop.is_closed():
            return
        if self._session is not None:
            self.submit(self._session.close()).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()
        self._reader.shutdown(wait=False, cancel_futures=True)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # /health and /flush_cache answer with plain text
