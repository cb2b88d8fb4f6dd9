"""What a terminal shows: progress and time left, the phase that runs, numbers, servers."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_dppo.training.metrics.live_display import LiveDisplay, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(display: LiveDisplay) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(display.render())
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def display(clock):
    display = LiveDisplay(Console(file=io.StringIO(), force_terminal=True, width=120), total_steps=10, clock=clock)
    display.start(2)
    yield display
    display.stop()


def test_progress_and_phases_say_how_long_they_still_take(display, clock) -> None:
    display.phase("rollout")
    clock.now += 20
    display.phase("update")
    clock.now += 10
    display.record(3, {"reward/mean": 0.25, "dppo/mask_fraction": 0.015})
    display.phase("rollout")
    clock.now += 5
    text = shown(display)
    assert "step 3/10" in text
    assert "35.0 s so far, 4 min 05 s left" in text  # seven steps at 35 s
    assert "rollout 5.0 s (about 15.0 s left)" in text
    assert "update 10.0 s" in text
    assert "reward 0.250" in text
    assert "masked 1.50%" in text
    assert "slowest" not in text  # there are no servers


def test_servers_are_shown_where_there_are_some(display) -> None:
    display.record(3, {"rollout/server_tokens_per_s_max": 900.0, "rollout/slowest_server": "http://a:1"})
    text = shown(display)
    assert "fastest 900 tok/s" in text
    assert "slowest is http://a:1" in text


def test_durations_read_as_a_person_says_them() -> None:
    assert [duration(seconds) for seconds in (0.44, 59.0, 185.0, 7800.0)] == [
        "0.4 s",
        "59.0 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
