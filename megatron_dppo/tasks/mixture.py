"""An endless, resumable stream of training problems, drawn from several tasks by weight."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.task import Problem, Task
from megatron_dppo.tasks.valid_text import check_problem_text

_BLOCK = 1000  # positions after which every task has had its exact share; also the resolution of the weights


class TaskMixture:
    """Problem ``i`` is a function of ``i``, the seed and the tasks alone, so a resumed run goes on where it stopped.

    Every block of 1000 positions holds the tasks in proportion to their weights, in an order shuffled anew for each
    block. Each task is gone through in a shuffled order, all of it before any problem returns, and then in another
    order. A problem that is not ``admissible`` (held out for evaluation, too long) is replaced by the next admissible
    one in that order.

    Args:
        tasks: with distinct names.
        weights: one positive number per task.
        seed: of the shuffles.
        admissible: which problems may be drawn; None: all.

    Attributes:
        tasks: as given.

    Raises:
        TaskError: no tasks, a repeated name, a weight that is not positive, or a task without any admissible problem.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        weights: Sequence[float],
        seed: int,
        admissible: Callable[[Problem], bool] | None = None,
    ) -> None:
        if not tasks:
            raise TaskError("a mixture needs at least one task")
        names = [task.name for task in tasks]
        for name, weight in zip(names, weights, strict=True):
            if names.count(name) > 1:
                raise TaskError(f"two tasks are called {name}; give each a name of its own")
            if not 0 < weight < float("inf"):
                raise TaskError(f"task {name}: weight must be a positive number, not {weight}")
        self.tasks = tuple(tasks)
        self._seed = seed
        self._admissible = admissible
        self._counts = _shares(weights)
        self._schedule: tuple[int, list[tuple[int, int]]] = (-1, [])
        self._orders: dict[int, tuple[int, list[int]]] = {}
        for task_index in range(len(tasks)):
            self._draw(task_index, 0)  # a task with nothing to train on is an error now, not at step 300

    def problem(self, position: int) -> Problem:
        """The problem at a position (0, 1, 2, ... without end)."""
        if position < 0:
            raise IndexError(f"positions start at 0, not {position}")
        block, offset = divmod(position, _BLOCK)
        if self._schedule[0] != block:
            self._schedule = (block, self._block_schedule(block))
        task_index, rank = self._schedule[1][offset]
        return self._draw(task_index, block * self._counts[task_index] + rank)

    def problems(self, start: int, count: int) -> list[Problem]:
        """The problems at positions ``start`` to ``start + count - 1``."""
        return [self.problem(position) for position in range(start, start + count)]

    def _block_schedule(self, block: int) -> list[tuple[int, int]]:
        """For every offset in the block: the task, and how many times the block had it before."""
        order = [task_index for task_index, count in enumerate(self._counts) for _ in range(count)]
        random.Random(f"{self._seed}/block/{block}").shuffle(order)
        seen = [0] * len(self.tasks)
        schedule = []
        for task_index in order:
            schedule.append((task_index, seen[task_index]))
            seen[task_index] += 1
        return schedule

    def _draw(self, task_index: int, draw: int) -> Problem:
        """The task's problem number ``draw``, counted over all epochs."""
        task = self.tasks[task_index]
        epoch, place = divmod(draw, len(task))
        if self._orders.get(task_index, (-1, []))[0] != epoch:
            order = list(range(len(task)))
            random.Random(f"{self._seed}/{task.name}/{epoch}").shuffle(order)
            self._orders[task_index] = (epoch, order)
        order = self._orders[task_index][1]
        for step in range(len(order)):
            problem = check_problem_text(task[order[(place + step) % len(order)]])
            if self._admissible is None or self._admissible(problem):
                return problem
        raise TaskError(
            f"task {task.name}: none of its {len(task)} problems may be trained on; all are held out for evaluation or "
            "too long (make the task's space of questions larger, the evaluation set smaller, or allow longer prompts)"
        )


def _shares(weights: Sequence[float]) -> list[int]:
    """Positions per block for each task: largest remainders, and at least one."""
    if len(weights) > _BLOCK:
        raise TaskError(f"a mixture holds at most {_BLOCK} tasks, not {len(weights)}")
    free = _BLOCK - len(weights)  # what is left once every task has its one
    quotas = [free * weight / sum(weights) for weight in weights]
    shares = [1 + int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda index: int(quotas[index]) - quotas[index])
    for index in by_remainder[: _BLOCK - sum(shares)]:
        shares[index] += 1
    return shares
