"""A server that hangs is told from one that is slow, is paused for a while, or has just started."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from megatron_dppo.errors import ConfigError, TransientServerError
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.servers.watchdog import Watchdog

A, B = "http://a:1", "http://b:1"


class Health:
    """In place of a transport, with the time: what a server says of its health, or whether it says nothing."""

    def __init__(self) -> None:
        self.now = 0.0
        self.healthy = {A: True, B: True}
        self.silent: set[str] = set()
        self.asked: list[tuple[str, float]] = []

    def request(self, url: str, path: str, body: None, timeout_s: float) -> str:
        assert (path, body) == ("/health", None)
        return url

    def submit(self, url: str) -> Future[Any]:
        self.asked.append((url, self.now))
        answer: Future[Any] = Future()
        if url in self.silent:
            return answer
        if self.healthy[url]:
            answer.set_result("")
        else:
            answer.set_exception(TransientServerError("503"))
        return answer

    def watch(self, dog: Watchdog, seconds: float, *urls: str) -> list[tuple[str, float]]:
        """Look every half second: (who hangs, when it was first said to)."""
        until, found = self.now + seconds, {}
        while self.now < until:
            for url in dog.hung(urls):
                found.setdefault(url, self.now)
            self.now += 0.5
        return list(found.items())


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def dog(health: Health) -> Watchdog:
    return Watchdog(health, 100.0, clock=lambda: health.now)


def test_one_that_answers_is_asked_every_ten_seconds_and_never_hangs(health: Health, dog: Watchdog) -> None:
    assert health.watch(dog, 1000, A) == []
    assert len(health.asked) == 100


@pytest.mark.parametrize("silent", [False, True])
def test_one_that_stops_to_be_healthy_hangs_after_the_limit_and_the_other_does_not(
    health: Health, dog: Watchdog, silent: bool
) -> None:
    """``silent``: it does not answer at all; otherwise it says that it generates nothing."""
    assert health.watch(dog, 200, A, B) == []
    health.healthy[A] = False
    health.silent |= {A} if silent else set()
    ((url, when),) = health.watch(dog, 150, A, B)
    assert url == A
    assert 300 - 11 <= when <= 300 + 1  # the last good answer was up to ten seconds before


def test_a_pause_that_is_shorter_than_the_limit_is_none(health: Health, dog: Watchdog) -> None:
    for _ in range(3):
        health.healthy[A] = False
        assert health.watch(dog, 80, A) == []
        health.healthy[A] = True
        assert health.watch(dog, 15, A) == []


def test_one_that_was_started_again_has_the_whole_limit(health: Health, dog: Watchdog) -> None:
    health.silent.add(A)
    assert health.watch(dog, 95, A) == []
    assert health.watch(dog, 5) == []  # it is loading
    assert health.watch(dog, 95, A) == []


def test_a_limit_within_which_an_update_may_last_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hang_timeout_s = 500 must be above sync_timeout_s = 600"):
        SGLangConfig(hang_timeout_s=500.0).check()
