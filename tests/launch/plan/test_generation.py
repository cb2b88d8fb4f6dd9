"""How long servers generate, against counting every step."""

from __future__ import annotations

import random

import pytest

from megatron_dppo.launch.plan.generation import generate


def _step_by_step(prompt: int, responses: list[int], at_once: int) -> float:
    waiting, active, seconds = list(responses), [], 0.0
    while waiting or active:
        while waiting and len(active) < at_once:
            active.append([prompt, waiting.pop(0)])
        seconds += _seconds(len(active), sum(tokens for tokens, _ in active) + len(active) / 2)
        active = [[tokens + 1, left - 1] for tokens, left in active if left > 1]
    return seconds


def _seconds(sequences: float, tokens: float) -> float:
    return 1.0 + 0.1 * sequences + 0.001 * tokens


@pytest.mark.parametrize(("count", "at_once"), [(1, 1), (20, 20), (50, 7), (5, 100)])
def test_sequences_come_and_go(count, at_once):
    draw = random.Random(count)
    responses = [draw.randint(1, 40) for _ in range(count)]
    made = generate(15, responses, at_once, _seconds)
    assert made.seconds == pytest.approx(_step_by_step(15, responses, at_once))
    assert made.most_at_once == min(count, at_once)


def test_nothing_to_generate_takes_no_time():
    assert generate(15, [], 4, _seconds).seconds == 0.0
