"""What should make a person look at a run: said once each, with the numbers that it was seen in.

An alarm stops nothing. It looks at the mean of a window of steps, so that the noise of one batch raises none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

from megatron_dppo.training.config.schema import AlarmsConfig
from megatron_dppo.training.metrics.sink import Metrics


@dataclass(frozen=True)
class Alarm:
    """One that was raised.

    Attributes:
        name: the option of ``logging.alarms`` that it belongs to.
        step: after which it was.
        message: what was seen, what the limit is, and where to read on.
        window: the numbers that it was seen in: {"step", metric: value} of each step.
    """

    name: str
    step: int
    message: str
    window: list[dict[str, float]]


class Alarms:
    """Watches steps in their order. ``raised``: names of those that this run has had already."""

    def __init__(self, config: AlarmsConfig, raised: Iterable[str] = ()) -> None:
        self._config = config
        self._raised = set(raised)
        self._steps: deque[dict[str, float]] = deque(maxlen=max(config.window, config.reward_flat))
        self._first_entropy: float | None = None
        self._rules: dict[str, Callable[[], str | None]] = {
            "mismatch_kl": lambda: self._above(
                "mismatch/kl_k3", config.mismatch_kl, "engine and policy drift apart: docs/mismatch.md"
            ),
            "mask_fraction": lambda: self._above(
                "dppo/mask_fraction", config.mask_fraction, "much of each batch is not learned from: docs/metrics.md"
            ),
            "largest_token_share": lambda: self._above(
                "dppo/largest_token_share", config.largest_token_share, "single tokens own the steps: docs/algorithm.md"
            ),
            "entropy_share": self._entropy,
            "reward_flat": self._reward,
        }

    def look(self, step: int, metrics: Metrics) -> list[Alarm]:
        """Take in a step; returns the alarms that it raises for the first time."""
        numbers = {name: float(value) for name, value in metrics.items() if not isinstance(value, str)}
        if "reward/mean" not in numbers:  # the evaluation before training
            return []
        self._steps.append({"step": float(step), **numbers})
        self._remember_entropy()
        found = []
        for name, rule in self._rules.items():
            if name not in self._raised and (message := rule()) is not None:
                self._raised.add(name)
                found.append(Alarm(name, step, message, list(self._steps)))
        return found

    def _last(self, metric: str, count: int) -> list[float] | None:
        """Of the last ``count`` steps; None if there are fewer, or one has none."""
        values = [of_step[metric] for of_step in list(self._steps)[-count:] if metric in of_step]
        return values if len(values) == count else None

    def _above(self, metric: str, limit: float, why: str) -> str | None:
        values = self._last(metric, self._config.window)
        if limit <= 0 or values is None or not (mean := fmean(values)) > limit:
            return None
        return f"{metric} was {mean:.3g} in the mean of {len(values)} steps, above {limit:g}: {why}"

    def _remember_entropy(self) -> None:
        if self._first_entropy is None and (values := self._last("entropy", self._config.window)) is not None:
            self._first_entropy = fmean(values)

    def _entropy(self) -> str | None:
        values, share = self._last("entropy", self._config.window), self._config.entropy_share
        if share <= 0 or values is None or self._first_entropy is None:
            return None
        mean, limit = fmean(values), share * self._first_entropy
        if mean >= limit:
            return None
        return (
            f"entropy was {mean:.3g} nats in the mean of {len(values)} steps, below {share:g} of the"
            f" {self._first_entropy:.3g} at the start: responses become all alike"
        )

    def _reward(self) -> str | None:
        steps = self._config.reward_flat
        values = self._last("reward/mean", steps) if steps > 0 else None
        if values is None or max(values) - min(values) > self._config.reward_range:
            return None
        return (
            f"reward/mean stayed between {min(values):.4g} and {max(values):.4g} for {steps} steps: nothing is learned"
            " (tasks too hard or solved, or a verifier that is broken: look at samples.jsonl)"
        )
