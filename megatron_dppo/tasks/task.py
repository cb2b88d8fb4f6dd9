"""What a task is: numbered problems, and a score in [0, 1] for an answer to one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


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


class Problems(Protocol):
    """A finite, deterministic list of problems: the same arguments give the same problems."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...


class Task(Problems, Protocol):
    """Problems with a scorer."""

    def score(self, problem: Problem, response: str) -> float:
        """Grade a decoded response. May raise; callers go through ``scoring.Scorer``, which guards it."""
        ...


@runtime_checkable
class BatchTask(Protocol):
    """A task that grades many responses at once better than one by one: what it waits for, it can wait for together."""

    def score_each(self, pairs: Sequence[tuple[Problem, str]]) -> Iterator[float | Exception]:
        """The score of every ``(problem, decoded response)`` in order, or what failed for it, as soon as it is there."""
        ...


def score_each(task: Task, pairs: Sequence[tuple[Problem, str]]) -> Iterator[float | Exception]:
    """``BatchTask.score_each`` of any task."""
    if isinstance(task, BatchTask):
        yield from task.score_each(pairs)
        return
    for problem, response in pairs:
        try:
            yield task.score(problem, response)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # scorers are programs of other people
            yield error if isinstance(error, Exception) else RuntimeError(repr(error))
