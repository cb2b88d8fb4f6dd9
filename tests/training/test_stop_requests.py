"""A signal leaves a note and nothing else; what was there before is put back."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time

import pytest

from megatron_dppo.training.stop_requests import StopRequests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_while_entered(number):
    before = signal.getsignal(number)
    with StopRequests() as requests:
        assert requests.reason is None
        os.kill(os.getpid(), number)
        assert requests.reason == number.name
    assert signal.getsignal(number) is before


def test_a_signal_is_known_while_the_main_thread_cannot_look():
    """As in a collective: no handler runs before it has ended."""
    seen_in_time: list[bool] = []
    ended = threading.Event()

    def ask_and_look(requests: StopRequests) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        while requests.signal is None:
            time.sleep(0.001)
        seen_in_time.append(not ended.is_set())

    with StopRequests() as requests:
        other = threading.Thread(target=ask_and_look, args=(requests,))
        other.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # a second without the interpreter's lock
        ended.set()
        other.join()
    assert seen_in_time == [True]


def test_a_second_interrupt_is_one():
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_allotted_time_is_a_reason_of_its_own(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    requests, unlimited = StopRequests(max_seconds=5.0), StopRequests()
    now[0] = 104.9
    assert requests.reason is None
    now[0] = 105.0
    assert requests.reason == "run.max_seconds = 5 are over"
    assert unlimited.reason is None
