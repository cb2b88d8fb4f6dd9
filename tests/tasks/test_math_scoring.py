"""Answers are compared by value."""

from __future__ import annotations

import threading

import pytest

from megatron_dppo.tasks.math_scoring import score_math


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("42", "The answer is 42.", 1.0),
        ("42", "42 or rather 43", 0.0),
        ("42", "", 0.0),
        ("1/2", "0.5", 1.0),
        ("\\frac{1}{2}", "so $\\boxed{0.5}$", 1.0),
        ("3\\sqrt{2}", "thus $3\\sqrt2$", 1.0),
        ("1,234", "1234", 1.0),
        ("x^2+1", "$1+x^2$", 1.0),
        ("7", "I first had 7, but it is \\boxed{8}", 0.0),
    ],
)
def test_equal_values_are_equal_answers(answer: str, response: str, reward: float) -> None:
    assert score_math(answer, response) == reward


def test_it_works_off_the_main_thread() -> None:
    """The library's own time limits are signals, which raise there."""
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.append(score_math("42", "it is 42")))
    thread.start()
    thread.join()
    assert rewards == [1.0]


def test_an_unreadable_reference_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(ValueError, match=r"reference answer 'a \$ b' is no mathematical expression"):
        score_math("a $ b", "42")
