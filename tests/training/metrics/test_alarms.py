"""Alarms: what raises each, and that noise, too few steps and a run that is continued raise none again."""

from __future__ import annotations

import pytest

from megatron_dppo.training.config.schema import AlarmsConfig
from megatron_dppo.training.metrics.alarms import Alarm, Alarms

CONFIG = AlarmsConfig(window=3, reward_flat=5)
HEALTHY = {
    "mismatch/kl_k3": 1e-3,
    "dppo/mask_fraction": 0.02,
    "dppo/largest_token_share": 0.01,
    "entropy": 1.0,
    "backend": "cpu",
}


def watched(alarms: Alarms, steps: int, first: int = 1, **changed: float) -> list[Alarm]:
    """Healthy steps, but for what is changed; the reward moves."""
    found = []
    for step in range(first, first + steps):
        metrics = {**HEALTHY, "reward/mean": 0.5 + 0.01 * (step % 3), **changed}
        found += alarms.look(step, metrics)
    return found


def test_a_healthy_run_raises_none() -> None:
    assert watched(Alarms(CONFIG), 50) == []


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("mismatch_kl", {"mismatch/kl_k3": 0.05}, "mismatch/kl_k3 was 0.0173 in the mean of 3 steps, above 0.01"),
        (
            "mask_fraction",
            {"dppo/mask_fraction": 0.6},
            "dppo/mask_fraction was 0.407 in the mean of 3 steps, above 0.3",
        ),
        (
            "largest_token_share",
            {"dppo/largest_token_share": 0.4},
            "dppo/largest_token_share was 0.14 in the mean of 3 steps, above 0.1",
        ),
        ("entropy_share", {"entropy": 0.05}, "below 0.1 of the 1 at the start"),
        ("reward_flat", {"reward/mean": 0.0}, "stayed between 0 and 0 for 5 steps"),
    ],
)
def test_each_alarm_is_raised_once_by_what_it_is_for(name: str, changed: dict[str, float], words: str) -> None:
    alarms = Alarms(CONFIG)
    watched(alarms, 3)
    (alarm,) = watched(alarms, 30, first=4, **changed)
    assert alarm.name == name
    assert words in alarm.message
    assert alarm.window[-1]["step"] == alarm.step
    assert set(changed) <= set(alarm.window[-1])


def test_one_noisy_batch_raises_none_and_nor_does_a_window_that_is_not_full() -> None:
    alarms = Alarms(CONFIG)
    assert watched(alarms, 2, **{"dppo/mask_fraction": 0.8}) == []
    assert watched(alarms, 2, first=3) != []  # the mean of three steps is above the limit
    alarms = Alarms(CONFIG)
    watched(alarms, 2)
    assert watched(alarms, 1, first=3, **{"dppo/mask_fraction": 0.8}) == []


def test_zero_switches_an_alarm_off_and_one_that_was_raised_before_stays_silent() -> None:
    broken = {"dppo/mask_fraction": 0.9}
    assert watched(Alarms(AlarmsConfig(window=3, mask_fraction=0.0)), 10, **broken) == []
    assert watched(Alarms(CONFIG, raised=["mask_fraction"]), 10, **broken) == []
    assert [alarm.name for alarm in watched(Alarms(CONFIG), 10, **broken)] == ["mask_fraction"]


def test_the_evaluation_before_training_and_nan_count_for_nothing() -> None:
    alarms = Alarms(CONFIG)
    assert alarms.look(0, {"eval/accuracy": 0.1}) == []
    assert watched(alarms, 10, **{"dppo/mask_fraction": float("nan")}) == []
