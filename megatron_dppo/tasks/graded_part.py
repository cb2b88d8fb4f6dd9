"""Which part of a response is graded: all of it, or what a thinking model says once it has thought."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.task import Problem, Task, score_each

GRADED_PARTS = ("all", "after_thinking")

END_OF_THINKING = "</think>"


def check_graded_part(name: str, graded_part: str) -> None:
    """Raise TaskError, naming the task, unless ``graded_part`` is one of ``GRADED_PARTS``."""
    if graded_part not in GRADED_PARTS:
        raise TaskError(f"task {name}: graded_part {graded_part!r} is unknown; choose {' or '.join(GRADED_PARTS)}")


class AfterThinkingTask:
    """The problems of another task, whatever its kind and reward, graded by what follows the last ``</think>`` only.

    A response without the mark ran out of tokens while thinking: it gives no answer and earns 0. The mark has to be in
    the decoded response, which special tokens are not: a tokenizer must hold it as text or as an ordinary added token.
    """

    def __init__(self, task: Task) -> None:
        self.name = task.name
        self._task = task

    def __len__(self) -> int:
        return len(self._task)

    def __getitem__(self, index: int) -> Problem:
        return self._task[index]

    def score(self, problem: Problem, response: str) -> float:
        """The task's own score of what follows the thoughts; raises what the task raises."""
        _, mark, answer = response.rpartition(END_OF_THINKING)
        return self._task.score(problem, answer) if mark else 0.0

    def score_each(self, pairs: Sequence[tuple[Problem, str]]) -> Iterator[float | Exception]:
        """``score`` of every pair; those that have an answer are handed to the task together."""
        parts = [(problem, response.rpartition(END_OF_THINKING)) for problem, response in pairs]
        scores = score_each(self._task, [(problem, answer) for problem, (_, mark, answer) in parts if mark])
        for _, (_, mark, _) in parts:
            yield next(scores) if mark else 0.0
