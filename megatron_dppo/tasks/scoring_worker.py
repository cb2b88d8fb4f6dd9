"""The process that grades: started by ``scoring.Scorer`` as ``python -m megatron_dppo.tasks.scoring_worker``.

It reads one pickled object at a time from the inherited socket and answers each response by itself, so that its parent
knows which one it was busy with when it hung or died:

    parent -> worker    (configs, timeout_s)                     once
    worker -> parent    ("ready", None) or ("failed", message)
    parent -> worker    [(problem, response), ...]               a chunk
    worker -> parent    ("reward", float) | ("error", message) | ("invalid", message)      for every item, in order

The end of the socket is the end of the worker, however its parent died.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.build import build_grader, tasks_by_name
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.custom_reward import check_reward
from megatron_dppo.tasks.task import Problem, Task, score_each


def main(connection: Connection) -> None:
    """Serve chunks until the parent closes the socket."""
    configs: list[TaskConfig]
    configs, timeout_s = connection.recv()
    try:
        tasks = {name: build_grader(config) for name, config in tasks_by_name(configs).items()}
    except TaskError as error:
        connection.send(("failed", str(error)))
        return
    connection.send(("ready", None))
    while True:
        answers = grade(tasks, connection.recv())
        while True:
            # Should the parent die while a scorer hangs, nobody is left to end this process; the watchdog needs no GIL.
            faulthandler.dump_traceback_later(timeout_s + 5.0, exit=True)
            answer = next(answers, None)
            if answer is None:
                break
            connection.send(answer)
        faulthandler.cancel_dump_traceback_later()


def grade(tasks: Mapping[str, Task], pairs: Sequence[tuple[Problem, str]]) -> Iterator[tuple[str, float | str]]:
    """For every pair ``("reward", r)``, or what went wrong: ``error``, the scorer raised; ``invalid``, it gave no reward.

    Neighbours of one task are handed to it together.
    """
    for name, group in itertools.groupby(pairs, key=lambda pair: pair[0].task_name):
        same = list(group)
        task = tasks.get(name)
        if task is None:
            known = ", ".join(tasks)
            for problem, _ in same:
                yield "error", f"{problem.problem_id} is from no task of this run ({known})"
            continue
        for (problem, _), score in zip(same, score_each(task, same), strict=True):
            yield _answer(problem, score)


def _answer(problem: Problem, score: float | Exception) -> tuple[str, float | str]:
    if isinstance(score, Exception):
        return "error", f"{problem.problem_id}: {type(score).__name__}: {score}"
    try:
        return "reward", check_reward(score)
    except ValueError as error:
        return "invalid", f"{problem.problem_id}: {error}"


if __name__ == "__main__":
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        main(Connection(int(sys.argv[1])))
    # This process leads a session of its own; whatever a scorer started in it ends with it.
    os.killpg(0, signal.SIGKILL)
