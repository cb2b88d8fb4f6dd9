"""Asks the servers for responses: many at a time, and again elsewhere when a server fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from megatron_dppo.compat.extras import from_extra
from megatron_dppo.distributed.open_files import make_room_for_requests
from megatron_dppo.errors import InvalidSampleError, RolloutError, StoppedWaitingError, TransientServerError
from megatron_dppo.rollout.engine import ServerLoad
from megatron_dppo.rollout.sample import FailedSample, Prompt, Sample, SamplingParams
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.dispatch import DirectDispatch, Dispatch, RoutedDispatch
from megatron_dppo.rollout.sglang.progress import ProgressWatch
from megatron_dppo.rollout.sglang.routed_experts import RoutingShape
from megatron_dppo.rollout.sglang.router import Router
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.sglang.wire_format import (
    build_request,
    generated_tokens,
    parse_response,
    request_seed,
    was_aborted,
)

with from_extra("sglang"):
    from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

_LOOK_FOR_STOP_S = 1.0
_log = logging.getLogger(__name__)
_RETRY_WAIT_S = wait_exponential_jitter(initial=0.2, max=5.0, jitter=0.2)


class RolloutClient:
    """One replica's view of the servers: which are alive, and how much it has asked of each."""

    def __init__(
        self,
        transport: Transport,
        config: SGLangConfig,
        routing: RoutingShape | None = None,
        stop: Callable[[], str | None] = lambda: None,
        router: Router | None = None,
    ) -> None:
        """``routing``: the shape of the policy's expert choices, if they can be asked for.

        ``stop``: asked every second, in the event loop: why to give up what is asked for, or None. ``router``: that stands
        before the servers; whoever owns them tells it which.

        Raises ConfigError if the system does not allow so many connections at once as ``config`` does.
        """
        make_room_for_requests(config.max_concurrent_requests)
        self._transport = transport
        self._config = config
        self._routing = routing
        self._stop = stop
        self._router = router
        self._dispatch: Dispatch = RoutedDispatch(router.url) if router is not None else DirectDispatch()
        self._health_checks: dict[str, asyncio.Future[None]] = {}
        self._last_failure = "no server was ever started"
        self._last_loads: Mapping[str, ServerLoad] = {}

    @property
    def last_loads(self) -> Mapping[str, ServerLoad]:
        """By url, the load of every server during the last ``generate``; empty before, and if that had no prompt."""
        return self._last_loads

    def set_servers(self, urls: Sequence[str]) -> None:
        """Use these servers from now on; all of them are taken to be alive."""
        self._dispatch.set_servers(urls)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, weight_version: int
    ) -> list[Sample | FailedSample]:
        """All samples of all (checked) prompts, in order; a FailedSample, with the reason, for one that could not be had.

        Raises StoppedWaitingError when ``stop`` has a reason; then the servers end what they were asked for.
        """
        return self._transport.submit(self._generate_all(prompts, sampling, weight_version)).result()

    async def _generate_all(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, weight_version: int
    ) -> list[Sample | FailedSample]:
        self._last_loads = {}
        if not prompts:
            return []
        watch = ProgressWatch(
            self._transport,
            self._dispatch.urls,
            timeout_s=self._config.request_timeout_s,
            control_timeout_s=self._config.control_timeout_s,
            router=self._router.url if self._router is not None else None,
        )
        try:
            async with watch:
                return await self._generate_watched(watch, prompts, sampling, weight_version)
        finally:
            self._last_loads = watch.loads()

    async def _generate_watched(
        self, watch: ProgressWatch, prompts: Sequence[Prompt], sampling: SamplingParams, weight_version: int
    ) -> list[Sample | FailedSample]:
        self._dispatch.begin(len(prompts), sampling.samples_per_prompt)
        gate = asyncio.Semaphore(self._config.max_concurrent_requests)
        tasks = [
            asyncio.ensure_future(
                self._or_failed(
                    self._generate_one(gate, watch, prompt, prompt_index, sample_index, sampling, weight_version),
                    prompt,
                    prompt_index,
                )
            )
            for prompt_index, prompt in enumerate(prompts)
            for sample_index in range(sampling.samples_per_prompt)
        ]
        try:
            await self._wait_for(tasks)
            return [
                task.result() if task.done() else self._unfinished(prompts, index // sampling.samples_per_prompt)
                for index, task in enumerate(tasks)
            ]
        finally:
            for task in tasks:  # what is still in flight would only load the servers
                task.cancel()

    async def _wait_for(self, tasks: Sequence[asyncio.Future[Any]]) -> None:
        """Until all are done or time is over."""
        answered = asyncio.ensure_future(asyncio.wait(tasks, timeout=self._config.generate_timeout_s))
        stopped = asyncio.ensure_future(self._reason_to_stop())
        try:
            await asyncio.wait([answered, stopped], return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                raise StoppedWaitingError(f"{stopped.result()} amid rollouts, which were given up")
        finally:
            answered.cancel()
            stopped.cancel()

    async def _reason_to_stop(self) -> str:
        while (reason := self._stop()) is None:
            await asyncio.sleep(_LOOK_FOR_STOP_S)
        return reason

    def _unfinished(self, prompts: Sequence[Prompt], prompt_index: int) -> FailedSample:
        prompt, limit = prompts[prompt_index], self._config.generate_timeout_s
        return FailedSample(
            prompt, f"sample of {prompt.prompt_id}: not complete after generate_timeout_s = {limit:g} s", prompt_index
        )

    async def _or_failed(self, asked: Awaitable[Sample], prompt: Prompt, prompt_index: int) -> Sample | FailedSample:
        try:
            return await asked
        except (RolloutError, InvalidSampleError) as error:
            return FailedSample(prompt, str(error), prompt_index)

    async def _generate_one(
        self,
        gate: asyncio.Semaphore,
        watch: ProgressWatch,
        prompt: Prompt,
        prompt_index: int,
        sample_index: int,
        sampling: SamplingParams,
        weight_version: int,
    ) -> Sample:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(TransientServerError),
            stop=stop_after_attempt(self._config.max_attempts),
            wait=_RETRY_WAIT_S,
        )
        async with gate:
            seed = request_seed(prompt, prompt_index, sample_index, sampling)
            body = build_request(prompt, sampling, seed)
            try:
                response: dict[str, Any] = await retrying(self._ask_some_server, watch, prompt_index, body)
            except RetryError as error:
                raise RolloutError(
                    f"prompt {prompt.prompt_id} failed {self._config.max_attempts} times; last: {self._last_failure}"
                ) from error
            routing = self._routing if sampling.return_routed_experts else None
            # Thousands of tokens each: the event loop would be late for everybody else's.
            return await self._transport.in_thread(
                lambda: parse_response(response, prompt, prompt_index, sampling, weight_version, routing)
            )

    async def _ask_some_server(self, watch: ProgressWatch, prompt_index: int, body: dict[str, Any]) -> dict[str, Any]:
        """One try, for as long as the server that is chosen makes progress."""
        if not self._dispatch.urls:
            raise RolloutError(f"no SGLang server is left; the last one failed with: {self._last_failure}")
        with self._dispatch.address_for(prompt_index) as url:
            try:
                response: dict[str, Any] = await watch.answer(
                    url, self._transport.request(url, "/generate", body, self._config.generate_timeout_s)
                )
            except TransientServerError as error:
                self._last_failure = str(error)
                # Which server it was, a router does not say.
                suspects = [url] if self._router is None else self._dispatch.urls
                await asyncio.gather(*(self._drop_if_dead(suspect, watch) for suspect in suspects))
                raise
        if was_aborted(response):
            self._last_failure = f"{url} aborted the request: {response['meta_info']['finish_reason']}"
            raise TransientServerError(self._last_failure)
        watch.completed(url, generated_tokens(response))
        return response

    async def _drop_if_dead(self, url: str, watch: ProgressWatch) -> None:
        """Wait for one health check of the server, shared by all requests that failed on it together."""
        if url not in self._dispatch.urls:
            return
        check = self._health_checks.get(url)
        if check is None or check.done():
            check = self._health_checks[url] = asyncio.ensure_future(self._check_health(url))
        await asyncio.shield(check)
        if self._router is not None and url not in self._dispatch.urls:
            watch.leave_out(url)

    async def _check_health(self, url: str) -> None:
        """Stop using a server that cannot answer at all; the next weight update decides whether it comes back."""
        try:
            await self._transport.request(url, "/health", None, self._config.control_timeout_s)
        except RolloutError:
            self._dispatch.drop(url)
            if self._router is not None:
                await self._take_out_of(self._router, url)

    async def _take_out_of(self, router: Router, url: str) -> None:
        try:
            await router.take_out(url)
        except RolloutError as error:  # if it does not answer at all, no request will be either
            _log.warning("%s does not answer, and may still be sent requests: %s", url, error)
