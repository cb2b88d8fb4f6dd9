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
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.build import build_task, tasks_by_name
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.custom_reward import check_reward
from megatron_dppo.tasks.task import Problem, Task


def main(connection: Connection) -> None:
    """Serve chunks until the parent closes the socket."""
    configs: list[TaskConfig]
    configs, timeout_s = connection.recv()
    try:
        tasks = {name: build_task(config) for name, config in tasks_by_name(configs).items()}
    except TaskError as error:
        connection.send(("failed", str(error)))
        return
    connection.send(("ready", None))
    while True:
        for problem, response in connection.recv():
            # Should the parent die while a scorer hangs, nobody is left to end this process; the watchdog needs no GIL.
            faulthandler.dump_traceback_later(timeout_s + 5.0, exit=True)
            connection.send(grade(tasks, problem, response))
            faulthandler.cancel_dump_traceback_later()


def grade(tasks: Mapping[str, Task], problem: Problem, response: str) -> tuple[str, float | str]:
    """``("reward", r)``, or what went wrong: the scorer raised (``error``) or returned no reward (``invalid``)."""
    task = tasks.get(problem.task_name)
    if task is None:
        return "error", f"{problem.problem_id} is from no task of this run ({', '.join(tasks)})"
    try:
        reward = task.score(problem, response)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return "error", f"{problem.problem_id}: {type(error).__name__}: {error}"
    try:
        return "reward", check_reward(reward)
    except ValueError as error:
        return "invalid", f"{problem.problem_id}: {error}"


if __name__ == "__main__":
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        main(Connection(int(sys.argv[1])))
    # This process leads a session of its own; whatever a scorer started in it ends with it.
    os.killpg(0, signal.SIGKILL)
