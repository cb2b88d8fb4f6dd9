"""Which of a run's responses the page shows: the worst, the best, and those that the trust region had most to do with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_OF_EACH_KIND = 30
_LONGEST_TEXT = 4000  # characters
_FIELDS = ("step", "prompt_id", "reward", "finish_reason", "tokens", "chosen")
_TEXTS = ("question", "answer", "response")


def sample_cards(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most 4 times ``_OF_EACH_KIND`` samples, in the order of steps. Those with single tokens go first."""
    orders: tuple[Callable[[dict[str, Any]], Any], ...] = (
        lambda sample: _reward(sample),
        lambda sample: -_reward(sample),
        lambda sample: -_held_back(sample),
        lambda sample: -_largest(sample, "divergence"),
    )
    chosen: dict[int, dict[str, Any]] = {}
    for order in orders:
        ranked = sorted(samples, key=lambda sample: (order(sample), "trace" not in sample, -sample["step"]))
        chosen |= {id(sample): sample for sample in ranked[:_OF_EACH_KIND]}
    return [_card(sample) for sample in samples if id(sample) in chosen]


def _reward(sample: dict[str, Any]) -> float:
    return float(sample.get("reward") or 0.0)


def _held_back(sample: dict[str, Any]) -> int:
    return sum(weight == 0 for weight in sample.get("trace", {}).get("weight", ()))


def _largest(sample: dict[str, Any], name: str) -> float:
    return max((value for value in sample.get("trace", {}).get(name, ()) if value is not None), default=-1.0)


def _card(sample: dict[str, Any]) -> dict[str, Any]:
    card = {name: sample.get(name) for name in _FIELDS}
    card |= {name: _shortened(str(sample.get(name, ""))) for name in _TEXTS}
    if "trace" in sample:
        card["trace"] = sample["trace"]
    return card


def _shortened(text: str) -> str:
    return (
        text
        if len(text) <= _LONGEST_TEXT
        else f"{text[:_LONGEST_TEXT]} … ({len(text) - _LONGEST_TEXT} more characters)"
    )
