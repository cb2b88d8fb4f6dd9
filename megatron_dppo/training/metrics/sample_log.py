"""What a run keeps of single responses, in samples.jsonl, and of all of them, in distributions.jsonl.

Both are bounded: so many responses a step, so many tokens of each with their weight and divergence in some of the steps, and
one line of fixed length for the distributions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_dppo.training.exchange import SampleReport
from megatron_dppo.training.metrics.token_record import POSITION_BINS, PROBABILITY_BINS, SUMMED, TRACED, StepTokens
from megatron_dppo.training.rollouts import Rollouts, ScoredSample

_REWARD_BINS = 20
_LENGTH_BINS = 32


def chosen_samples(rollouts: Rollouts, count: int) -> dict[int, str]:
    """Number of each response to be kept -> why: worst, best, or spread over the batch. The same on every rank.

    They are of the first replica, whose samples are on the rank that writes.
    """
    own = [report for report in rollouts.reports if rollouts.sources[report.number] == 0]
    if not own or count < 1:
        return {}
    chosen = {min(own, key=_by_reward).number: "worst"}
    if count > 1:
        chosen.setdefault(max(own, key=_by_reward).number, "best")
    stride = max(len(own) // count, 1)
    for report in [*own[::stride], *own]:
        if len(chosen) >= min(count, len(own)):
            break
        chosen.setdefault(report.number, "spread")
    return dict(sorted(chosen.items()))


def _by_reward(report: SampleReport) -> tuple[float, int]:
    return report.reward, -report.number


def sample_records(
    step: int,
    own: Mapping[int, ScoredSample],
    chosen: Mapping[int, str],
    tokens: StepTokens,
    token_texts: Callable[[Sequence[int]], list[str]],
) -> list[dict[str, Any]]:
    """The lines of samples.jsonl. ``trace`` is there where single tokens were recorded; None stands for a token that was left
    out of the loss.
    """
    records = []
    for number, why in chosen.items():
        sample = own[number].sample
        problem = sample.prompt.metadata["problem"]
        record = {
            "step": step,
            "prompt_id": sample.prompt.prompt_id,
            "question": problem.question,
            "answer": problem.answer,
            "response": own[number].response,
            "reward": sample.reward,
            "finish_reason": sample.finish_reason,
            "tokens": len(sample.response_ids),
            "weight_versions": sample.weight_versions,
            "number": number,
            "chosen": why,
        }
        if trace := tokens.traces.get(number):
            record["trace"] = _trace(trace, sample.response_ids, token_texts)
        records.append(record)
    return records


def _trace(
    of_place: Mapping[int, list[float]], response_ids: Sequence[int], token_texts: Callable[[Sequence[int]], list[str]]
) -> dict[str, list[Any]]:
    length = max(of_place) + 1
    columns = {
        name: [of_place[place][column] if place in of_place else None for place in range(length)]
        for column, name in enumerate(TRACED)
    }
    return {"text": token_texts(response_ids[:length]), **columns}


def distribution_record(step: int, rollouts: Rollouts, tokens: StepTokens, longest: int) -> dict[str, Any]:
    """The line of distributions.jsonl: counts of rewards and lengths, sums over tokens by place and by probability.

    Args:
        step: that was done.
        rollouts: its samples, of all replicas.
        tokens: what the update did to them.
        longest: response, in tokens, that there can be.
    """
    rewards = [report.reward for report in rollouts.reports]
    lengths = [float(report.response_tokens) for report in rollouts.reports]
    used = max((at + 1 for at, row in enumerate(tokens.by_position) if row[0]), default=0)
    width = max(math.ceil((longest + 1) / _LENGTH_BINS), 1)
    return {
        "step": step,
        "reward": {
            "low": 0.0,
            "width": 1.0 / _REWARD_BINS,
            "counts": _counts(rewards, 1.0 / _REWARD_BINS, _REWARD_BINS),
        },
        "length": {"low": 0.0, "width": width, "counts": _counts(lengths, width, _LENGTH_BINS)},
        "position": _columns(POSITION_BINS[:used], tokens.by_position),
        "probability": _columns(PROBABILITY_BINS, tokens.by_probability),
    }


def _counts(values: Sequence[float], width: float, bins: int) -> list[int]:
    """How many of ``values`` are in each bin from 0 on; the last one has what is at its upper end, and beyond, too."""
    counts = [0] * bins
    for value in values:
        counts[min(max(int(value / width + 1e-9), 0), bins - 1)] += 1
    return counts


def _columns(lowest: Sequence[float], rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """{"lowest": of each bin, SUMMED: of each bin}."""
    columns = {name: [float(f"{row[at]:.6g}") for row in rows[: len(lowest)]] for at, name in enumerate(SUMMED)}
    return {"lowest": list(lowest), **columns}
