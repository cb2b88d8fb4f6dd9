"""Keep evaluation problems out of training.

Generators with small spaces repeat themselves (chain_sum with two one-digit terms knows 200 questions), and
reasoning-gym derives problem ``i`` from ``seed + i``, so different seeds do not mean different problems. What holds
evaluation apart is the question's text: the evaluation set is fixed first, without repetitions, and training skips
every problem whose question is in it. Two questions are the same if they differ in white space or letter case only;
``2 + 3`` and ``3 + 2`` are different questions.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.task import Problem, Task
from megatron_dppo.tasks.valid_text import check_problem_text


def question_key(question: str) -> str:
    """What two equal questions have in common."""
    return " ".join(question.split()).casefold()


class EvaluationSet:
    """The distinct problems of the evaluation tasks, in order, and the test that training applies.

    Attributes:
        problems: one per distinct question; the first of equal ones is kept.
        repeated: how many problems were dropped as repetitions.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        names = [task.name for task in tasks]
        for name in names:
            if names.count(name) > 1:
                raise TaskError(f"two evaluation tasks are called {name}; give each a name of its own")
        distinct: dict[str, Problem] = {}
        for task in tasks:
            for index in range(len(task)):
                problem = check_problem_text(task[index])
                distinct.setdefault(question_key(problem.question), problem)
        self.problems = list(distinct.values())
        self.repeated = sum(len(task) for task in tasks) - len(self.problems)
        self._keys = frozenset(distinct)

    def __contains__(self, problem: Problem) -> bool:
        """Whether the problem's question is held out."""
        return question_key(problem.question) in self._keys
