"""A task that takes nothing to import, for runs whose rewards only have to differ."""

from __future__ import annotations

from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.task import Problem

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class CountingTask:
    """Numbers in words, from ``seed`` on. What a response earns depends on its length."""

    def __init__(self, config: TaskConfig) -> None:
        self.name = config.name
        self._size, self._first = config.size or 1, config.seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self._size:
            raise IndexError(index)
        number = str(self._first + index)
        return Problem(f"{self.name}/{index}", " ".join(_DIGITS[int(digit)] for digit in number), number)

    def score(self, problem: Problem, response: str) -> float:
        return (len(response) % 5) / 4
