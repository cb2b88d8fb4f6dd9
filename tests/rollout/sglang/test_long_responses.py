"""A real server's load changes while it decodes: what ``request_timeout_s`` rests on."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dppo.rollout.sample import FailedSample, SamplingParams
from megatron_dppo.rollout.sglang.progress import LOADS_PATH
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.rollout.engine_contract import make_prompts
from tests.rollout.sglang.conftest import tiny_weights

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
TIMEOUT_S = 2.0


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
        warm_up = engine.generate(
            make_prompts(250, [4]), SamplingParams(max_new_tokens=4)
        )  # the first batch takes seconds
        polls.clear()
        engine._config.request_timeout_s = TIMEOUT_S
        samples = engine.generate(make_prompts(250, [4]), SamplingParams(max_new_tokens=370, samples_per_prompt=24))
        (load,) = engine.server_loads().values()
    finally:
        engine.close()
    assert [sample.reason for sample in warm_up + samples if isinstance(sample, FailedSample)] == []
    assert [len(sample.response_ids) for sample in samples] == [370] * 24
    # Polls are a tenth of the timeout apart, or more: with so many, no response came within it.
    assert len(polls) > 10
    assert len({poll["num_used_tokens"] for poll in polls}) > 3
    assert load.tokens_per_s > 0
    assert load.queue_depth_max is not None
