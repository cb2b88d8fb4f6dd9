"""What a task is: numbered problems, and a score in [0, 1] for an answer to one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        problem_id: the task's name, a slash and the problem's index, e.g. ``"chain_sum/17"``; unique within the task.
        question: what the user asks, before any chat template.
        answer: the reference answer as text, or None if there is none (a custom reward may not need one).
        metadata: whatever the scorer needs beyond that; picklable.
    """

    problem_id: str
    question: str
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def task_name(self) -> str:
        """Name of the task that the problem is from and that grades it."""
        return self.problem_id.rpartition("/")[0]


class Task(Protocol):
    """A finite, deterministic list of problems with a scorer: the same arguments give the same problems."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...

    def score(self, problem: Problem, response: str) -> float:
        """Grade a decoded response. May raise; callers go through ``scoring.Scorer``, which guards it."""
        ...
