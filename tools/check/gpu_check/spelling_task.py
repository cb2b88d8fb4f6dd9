"""The quick start's task without the library that it is from, and in less time: words of few letters, spelled backward."""

from __future__ import annotations

import random

from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.task import Problem

_LETTERS = "abcdefgh"
_LENGTHS = (3, 4)


class SpellingTask:
    """``kind: custom``. A wrong answer earns the share of the word's letters that are in their places."""

    def __init__(self, config: TaskConfig) -> None:
        self.name = config.name
        self._size, self._seed = config.size or 1000, config.seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self._size:
            raise IndexError(index)
        letters = random.Random(f"{self._seed}/{index}")
        word = "".join(letters.choices(_LETTERS, k=letters.choice(_LENGTHS)))
        question = f"Spell this word backward (example: sun -> nus): {word}"
        return Problem(f"{self.name}/{index}", question, word[::-1])

    def score(self, problem: Problem, response: str) -> float:
        """In [0, 1]; letters that are too many count as wrong ones."""
        expected, given = problem.answer or "", response.strip()
        right = sum(a == b for a, b in zip(expected, given, strict=False))
        return right / max(len(expected), len(given), 1)
