"""Scored responses that were made up: what comes of them in a run's folder is what tests look at."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from megatron_dppo.rollout.sample import Prompt, Sample
from megatron_dppo.training.exchange import SampleReport
from megatron_dppo.training.rollouts import Rollouts, ScoredSample


def made_rollouts(rewards: Sequence[float], replicas: int = 1, text: str = "an answer") -> Rollouts:
    """One response to each prompt, of 1, 2, ... tokens; every ``replicas``-th is the first replica's own."""
    samples = {}
    for number, reward in enumerate(rewards):
        length = number + 1
        problem = SimpleNamespace(question=f"question {number}", answer="right")
        prompt = Prompt(f"task/{number}", (1, 2), {"problem": problem})
        sample = Sample(prompt, list(range(length)), [-1.0] * length, "stop", [(1, length)], group_id=number)
        sample.reward = reward
        samples[number] = ScoredSample(sample, text)
    reports = [
        SampleReport(number, 2, number + 1, float(scored.sample.reward or 0.0), False, False, 1)
        for number, scored in samples.items()
    ]
    return Rollouts(
        reports=reports,
        sources={number: number % replicas for number in samples},
        own={number: scored for number, scored in samples.items() if number % replicas == 0},
        failed=0,
        reasons=[],
        scoring_failures=0,
        stop=None,
        save=False,
        server_loads={},
        seconds={},
    )


def token_texts(response_ids: Sequence[int]) -> list[str]:
    """As RolloutPhase.token_texts."""
    return [f"t{token} " for token in response_ids]
