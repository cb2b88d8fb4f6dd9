"""The reward of a model, or any other judge, that answers over HTTP.

A scoring worker hands all responses of a message over together: they travel in batches, several requests at a time. A request
that cannot be had, or an answer that is no number, is the failure of its own responses only.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from megatron_dppo.compat.extras import from_extra
from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.answer_extraction import check_answer_extraction, extract_answer
from megatron_dppo.tasks.config import LONGEST_WAIT_S, HttpRewardConfig
from megatron_dppo.tasks.problem_fields import find_field
from megatron_dppo.tasks.task import Problem, Problems

with from_extra("http-reward"):
    import aiohttp
    from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

BATCHES = ("none", "items", "columns")
SCALES = ("linear", "sigmoid")

_SOURCES = ("question", "response", "answer", "system_prompt", "metadata")
_LARGEST_ANSWER = 16 << 20
_TRY_AGAIN = (408, 425, 429)

Pair = tuple[Problem, str]


class HttpRewardError(RuntimeError):
    """No reward could be had; the message says why."""


class _TryAgainError(HttpRewardError):
    """It may be had with another try."""


class HttpRewardTask:
    """The problems of another task, graded by a service.

    Args:
        problems: what is asked.
        config: where the service is, and how it wants to be asked.
        answer_extraction: what is sent as ``response``; an empty text where there is nothing to extract.

    Raises:
        TaskError: a setting that makes no sense, or the environment variable with the key is not set.
    """

    def __init__(self, problems: Problems, config: HttpRewardConfig, answer_extraction: str = "none") -> None:
        check_answer_extraction(answer_extraction)
        check_http_reward(problems.name, config)
        self.name = problems.name
        self._problems = problems
        self._config = config
        self._answer_extraction = answer_extraction
        self._headers = _authorization(problems.name, config)

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]

    def score(self, problem: Problem, response: str) -> float:
        """One response's reward. Raises HttpRewardError."""
        (score,) = self.score_each([(problem, response)])
        if isinstance(score, Exception):
            raise score
        return score

    def score_each(self, pairs: Sequence[Pair]) -> Iterator[float | Exception]:
        """The reward of every pair, in order, each as soon as it and those before it are there."""
        size = self._config.batch_size
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        loop = asyncio.new_event_loop()
        try:
            session, requests = loop.run_until_complete(self._ask_for(batches))
            try:
                for request in requests:
                    yield from loop.run_until_complete(request)
            finally:
                for request in requests:
                    request.cancel()
                loop.run_until_complete(asyncio.gather(*requests, return_exceptions=True))
                loop.run_until_complete(session.close())
        finally:
            loop.close()

    async def _ask_for(
        self, batches: Sequence[Sequence[Pair]]
    ) -> tuple[aiohttp.ClientSession, list[asyncio.Task[list[float | Exception]]]]:
        session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._config.timeout_s),
            connector=aiohttp.TCPConnector(limit=0),
        )
        gate = asyncio.Semaphore(self._config.concurrency)
        return session, [asyncio.ensure_future(self._ask(session, gate, batch)) for batch in batches]

    async def _ask(
        self, session: aiohttp.ClientSession, gate: asyncio.Semaphore, batch: Sequence[Pair]
    ) -> list[float | Exception]:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TryAgainError),
            stop=stop_after_attempt(self._config.tries),
            wait=wait_exponential_jitter(initial=0.1, max=LONGEST_WAIT_S, jitter=0.4),
            reraise=True,
        )
        body = self._body(batch)
        try:
            async with gate:
                answer: Any = await retrying(self._post, session, body)
            return self._rewards(answer, len(batch))
        except HttpRewardError as error:
            return [error] * len(batch)

    async def _post(self, session: aiohttp.ClientSession, body: Any) -> Any:
        """The answer's JSON. An error names the place without what may be secret in it."""
        place = _public(self._config.url)
        try:
            async with session.post(self._config.url, json=body, allow_redirects=False) as response:
                if response.status >= 500 or response.status in _TRY_AGAIN:
                    raise _TryAgainError(f"{place} answers {response.status}")
                if response.status != 200:
                    raise HttpRewardError(f"{place} answers {response.status}")
                text = bytearray()
                async for piece in response.content.iter_chunked(1 << 16):
                    text += piece
                    if len(text) > _LARGEST_ANSWER:
                        raise HttpRewardError(f"{place} answers with more than {_LARGEST_ANSWER >> 20} MiB")
        except asyncio.TimeoutError:
            raise _TryAgainError(f"{place} does not answer within {self._config.timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise _TryAgainError(f"{place} cannot be asked ({type(error).__name__})") from None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise HttpRewardError(f"{place} answers with something else than JSON: {bytes(text[:80])!r}") from None

    def _body(self, batch: Sequence[Pair]) -> Any:
        items = [self._item(problem, response) for problem, response in batch]
        if self._config.batch == "columns":
            return {**self._config.constants, **{name: [item[name] for item in items] for name in self._config.sent}}
        if self._config.batch == "none":
            return {**self._config.constants, **items[0]}
        return items if self._config.items is None else {**self._config.constants, self._config.items: items}

    def _item(self, problem: Problem, response: str) -> dict[str, Any]:
        values = {
            "question": problem.question,
            "response": extract_answer(response, self._answer_extraction) or "",
            "answer": problem.answer,
            "system_prompt": problem.metadata.get("system_prompt"),
            "metadata": problem.metadata,
        }
        return {name: find_field(values, source) for name, source in self._config.sent.items()}

    def _rewards(self, answer: Any, count: int) -> list[float | Exception]:
        if self._config.batch == "none":
            answers: Any = [answer]
        else:
            answers = _at(answer, self._config.rewards)
            if not isinstance(answers, list) or len(answers) != count:
                found = f"a list of {len(answers)}" if isinstance(answers, list) else f"a {type(answers).__name__}"
                raise HttpRewardError(f"{_public(self._config.url)} gives {found} for {count} responses")
        return [self._reward(one) for one in answers]

    def _reward(self, answer: Any) -> float | Exception:
        value = _at(answer, self._config.reward)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return HttpRewardError(f"{_public(self._config.url)} gives {str(value)[:80]!r} as reward, no finite number")
        if self._config.scale == "sigmoid":
            return 1.0 / (1.0 + math.exp(-value)) if value > -700 else 0.0
        return (value - self._config.lowest) / (self._config.highest - self._config.lowest)


def check_http_reward(name: str, config: HttpRewardConfig) -> None:
    """Raise TaskError, naming the task, for settings that make no sense."""
    place = urlsplit(config.url)
    problem = None
    if place.scheme not in ("http", "https") or not place.hostname:
        problem = "url has to be http://... or https://..."
    elif place.username or place.password:
        problem = "url must not hold a password; name an environment variable in api_key_env"
    elif config.batch not in BATCHES:
        problem = f"batch {config.batch!r} is unknown; choose {', '.join(BATCHES)}"
    elif config.scale not in SCALES:
        problem = f"scale {config.scale!r} is unknown; choose {' or '.join(SCALES)}"
    elif not 1 <= config.batch_size <= 32 or (config.batch == "none" and config.batch_size > 1):
        problem = "batch_size is 1 to 32, and 1 with batch: none"
    elif any(source.partition(".")[0] not in _SOURCES for source in config.sent.values()):
        problem = f"request maps names to {', '.join(_SOURCES)} or metadata.<field>"
    elif set(config.sent) & set(config.constants):
        problem = f"{min(set(config.sent) & set(config.constants))} is in request and in constants"
    elif not config.lowest < config.highest:
        problem = "lowest has to be less than highest"
    elif config.timeout_s <= 0 or config.tries < 1 or config.concurrency < 1:
        problem = "timeout_s, tries and concurrency have to be positive"
    if problem:
        raise TaskError(f"task {name}: http_reward: {problem}")


def _authorization(name: str, config: HttpRewardConfig) -> dict[str, str]:
    if config.api_key_env is None:
        return {}
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise TaskError(f"task {name}: http_reward.api_key_env names {config.api_key_env}, which is not set")
    if not key.isascii() or not key.isprintable():
        raise TaskError(f"task {name}: what is in {config.api_key_env} cannot be sent as a key")
    return {"Authorization": f"Bearer {key}"}


def _at(value: Any, path: str) -> Any:
    return find_field(value, path) if path else value


def _public(url: str) -> str:
    """The place without its query, which may hold a key."""
    place = urlsplit(url)
    return urlunsplit((place.scheme, place.netloc, place.path, "", ""))
