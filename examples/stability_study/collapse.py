"""What counts as a collapse, fixed before the first run (docs/stability_study.md has the reasons), and how it is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 5  # steps that are averaged
DROP = 0.2  # of the mean reward, in [0, 1], below the best before
SOLVED = 0.95
_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Outcome:
    """Of one run.

    Attributes:
        collapsed: the mean reward of some ``WINDOW`` steps was more than ``DROP`` below the best before, or the run could
            not go on.
        step: the last of the first such window (or the last step); None: it did not collapse.
        solved: the mean reward of the last ``WINDOW`` steps is at least ``SOLVED``, in a run that did not collapse.
        best: the highest mean reward of a window, or the warm start's reward.
        last: mean reward of the last ``WINDOW`` steps.
    """

    collapsed: bool
    step: int | None
    solved: bool
    best: float
    last: float


def outcome(rewards: Sequence[float], start: float, reached_its_end: bool) -> Outcome:
    """How a run ended.

    Args:
        rewards: the mean reward of every step, the first of which is made before any update. ValueError without any.
        start: reward of the warm start, from more prompts than one step has: by chance alone a first step can lie high
            enough for a fall to be seen where there is none.
        reached_its_end: it made all its steps.
    """
    if not rewards:
        raise ValueError("a run without a step has no outcome")
    best, collapsed_at = start, None
    last = best
    for step in range(1, len(rewards) + 1):
        window = rewards[max(0, step - WINDOW) : step]
        last = sum(window) / len(window)
        if step < WINDOW:
            continue
        if collapsed_at is None and last < best - DROP:
            collapsed_at = step
        best = max(best, last)
    if collapsed_at is None and not reached_its_end:
        collapsed_at = len(rewards)
    collapsed = collapsed_at is not None
    return Outcome(collapsed, collapsed_at, not collapsed and last >= SOLVED, best, last)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, 1927); (0, 1) of no trials."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, _Z_95**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # At either end the interval touches it exactly; rounding must not leave it just short.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == trials else min(1.0, middle + half)
    return low, high
