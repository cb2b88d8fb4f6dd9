"""A real server's load changes while it decodes: what ``request_timeout_s`` rests on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from megatron_dppo.rollout.sample import FailedSample, SamplingParams
from megatron_dppo.rollout.sglang.progress import LOADS_PATH
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.rollout.engine_contract import make_prompts
from tests.rollout.sglang.conftest import tiny_weights

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
T = TypeVar("T")


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    began = time.monotonic()
    return action(), time.monotonic() - began


def test_responses_take_longer_than_the_timeout_on_a_server_that_makes_progress(servers, monkeypatch):
    """All responses are decoded in one batch and end together, so that only the load tells of progress until then."""
    engine = servers("qwen3_moe").attach(max_attempts=1)
    polls: list[Any] = []
    ask = engine._transport.request

    async def recorded(url: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        answer = await ask(url, path, body, timeout_s)
        if path == LOADS_PATH:
            polls.append(answer["loads"][0])
        return answer

    monkeypatch.setattr(engine._transport, "request", recorded)
    try:
        engine.update_weights(WholeWeights(tiny_weights("qwen3_moe", seed=0)[1]), version=1)
        # The first batch takes seconds longer; the second says how fast this machine is.
        warm_up = engine.generate(make_prompts(250, [4]), SamplingParams(max_new_tokens=4))
        sampling = SamplingParams(max_new_tokens=370, samples_per_prompt=24)
        _, needed_s = _timed(lambda: engine.generate(make_prompts(250, [4]), sampling))
        polls.clear()
        engine._config.request_timeout_s = needed_s / 3
        samples, took_s = _timed(lambda: engine.generate(make_prompts(250, [4]), sampling))
        (load,) = engine.server_loads().values()
    finally:
        engine.close()
    assert [sample.reason for sample in warm_up + samples if isinstance(sample, FailedSample)] == []
    assert [len(sample.response_ids) for sample in samples] == [370] * 24
    assert took_s > needed_s / 3
    assert len({poll["num_used_tokens"] for poll in polls}) > 3
    assert load.tokens_per_s > 0
    assert load.queue_depth_max is not None
