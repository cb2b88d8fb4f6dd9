"""A reward that is the user's own function, named by dotted path in the config."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.answer_extraction import check_answer_extraction, extract_answer
from megatron_dppo.tasks.dotted_path import load_object
from megatron_dppo.tasks.task import Problem, Problems

RewardFunction = Callable[..., float]

_SIGNATURE = "f(question: str, response: str, answer: str | None, metadata: dict) -> float"


class CustomRewardTask:
    """The problems of another task, graded by the user's function.

    The function is called with keyword arguments ``question``, ``response`` (after answer extraction; an empty string
    if there is nothing to extract), ``answer`` and ``metadata`` (of the problem), and returns a number in [0, 1].

    Raises TaskError if ``reward`` cannot be loaded or cannot be called that way.
    """

    def __init__(self, problems: Problems, reward: str, answer_extraction: str = "none") -> None:
        check_answer_extraction(answer_extraction)
        self.name = problems.name
        self._problems = problems
        self._answer_extraction = answer_extraction
        self._reward = load_reward_function(reward)

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]

    def score(self, problem: Problem, response: str) -> float:
        """What the user's function returns; raises whatever it raises."""
        return self._reward(
            question=problem.question,
            response=extract_answer(response, self._answer_extraction) or "",
            answer=problem.answer,
            metadata=problem.metadata,
        )


def load_reward_function(path: str) -> RewardFunction:
    """Import ``package.module:function``; check that it takes ``question``, ``response``, ``answer``, ``metadata``."""
    function = load_object(path, "reward function")
    if not callable(function):
        raise TaskError(f"reward function {path!r} is a {type(function).__name__}, not a function; write {_SIGNATURE}")
    try:
        inspect.signature(function).bind(question="", response="", answer=None, metadata={})
    except TypeError as error:
        raise TaskError(f"reward function {path!r} cannot be called ({error}); write {_SIGNATURE}") from error
    except ValueError:  # a built-in without a signature: the first call will tell
        pass
    return function


def check_reward(reward: object) -> float:
    """The reward as a float. Raises ValueError unless it is a finite number in [0, 1].

    Nothing is clipped: a reward of 5, or of NaN, means that the scorer computes something else than was intended.
    """
    try:
        value = float(reward)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"the reward is {reward!r}, not a number") from None
    if not math.isfinite(value) or not 0.0 <= value <= 1.0:
        raise ValueError(f"the reward is {value}, not in [0, 1]")
    return value
