"""Grade responses in processes of their own, so that a bad scorer costs a reward and never the run.

A verifier is foreign code that reads model output: it raises, hangs in a regular expression or in big-integer
arithmetic, or takes its process down. Threads cannot be ended and signals do not interrupt C code, so grading happens
in worker processes that can be killed. They are started with exec (never forked from a trainer that has torch threads
and process groups), do not re-import ``__main__``, see no GPU, and build their tasks from the configs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from megatron_dppo.errors import ScoringError, TaskError
from megatron_dppo.tasks.build import tasks_by_name
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.task import Problem

ScoringFailure = Literal["error", "invalid", "timeout", "crash"]

_STARTUP_TIMEOUT_S = 180.0  # importing the package on a busy node with a slow file system
_CHUNK = 32  # responses per message to a worker: few enough to keep all workers busy, enough to make messages cheap


@dataclass(frozen=True)
class ScoreResult:
    """The grade of one response.

    Attributes:
        reward: in [0, 1]; 0 after a failure.
        failure: None, or ``error`` (the scorer raised), ``invalid`` (it returned something that is not in [0, 1]),
            ``timeout`` (it was ended), ``crash`` (its process died).
        detail: what went wrong, naming the problem.
    """

    reward: float
    failure: ScoringFailure | None = None
    detail: str | None = None


@dataclass
class _Worker:
    """A process, the items it has been sent, in order, and the time at which the first of them counts as hanging."""

    process: subprocess.Popen[bytes]
    connection: Connection
    pending: deque[int] = field(default_factory=deque)
    deadline: float = 0.0


class Scorer:
    """Grades batches of responses. Used by one thread at a time.

    Args:
        configs: of all tasks whose problems will be graded, training and evaluation together.
        timeout_s: time limit for one response.
        workers: processes. They start with the first ``score`` (or with ``start``) and live until ``close``.

    Attributes:
        scoring_failures: how many responses failed so far, by kind.
    """

    def __init__(self, configs: Sequence[TaskConfig], timeout_s: float = 10.0, workers: int = 1) -> None:
        if timeout_s <= 0:
            raise TaskError(f"the scoring timeout must be positive, not {timeout_s} s")
        if workers < 1:
            raise TaskError(f"scoring needs at least one worker, not {workers}")
        tasks_by_name(configs)  # its error belongs here and not in a worker
        self._configs = list(configs)
        self._timeout_s = timeout_s
        self._worker_count = workers
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _end_all, self._workers)
        self.scoring_failures: Counter[str] = Counter()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers now and return when they are ready. Raises ScoringError if they cannot build the tasks."""
        missing = self._worker_count - len(self._workers)
        started = [self._launch() for _ in range(missing)]  # all at once: their imports take seconds
        for worker in started:
            self._await_ready(worker)

    def score(self, pairs: Sequence[tuple[Problem, str]]) -> list[ScoreResult]:
        """Grade ``(problem, decoded response)`` pairs, in order; never raises because of a scorer.

        Raises ScoringError only if no worker can be started at all: a run without any verifier would train on zeros.
        """
        results: list[ScoreResult | None] = [None] * len(pairs)
        # Neighbours of one task: a worker hands them to it together.
        queue = deque(sorted(range(len(pairs)), key=lambda index: pairs[index][0].task_name))
        while queue or any(worker.pending for worker in self._workers):
            if queue:
                self.start()  # replaces workers that were ended
            for worker in self._workers:
                if queue and not worker.pending:
                    self._send_chunk(worker, queue, pairs)
            for worker in self._wait():
                self._receive(worker, queue, pairs, results)
        graded = [result for result in results if result is not None]
        self.scoring_failures.update(result.failure for result in graded if result.failure is not None)
        return graded

    def close(self) -> None:
        """End the workers and whatever their scorers started. Safe to call twice."""
        _end_all(self._workers)

    def _launch(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_dppo.tasks.scoring_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_worker_environment(),
                start_new_session=True,  # so that killing the group reaches the processes that a scorer started
            )
        worker = _Worker(process, Connection(ours.detach()))
        self._workers.append(worker)
        with contextlib.suppress(BrokenPipeError):  # it died at once; _await_ready says so
            worker.connection.send((self._configs, self._timeout_s))
        return worker

    def _await_ready(self, worker: _Worker) -> None:
        try:
            if not worker.connection.poll(_STARTUP_TIMEOUT_S):
                raise ScoringError(f"a scoring worker was not ready after {_STARTUP_TIMEOUT_S:.0f} s")
            status, message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self.close()
            raise ScoringError("a scoring worker died while starting; its own message is on stderr") from None
        except ScoringError:
            self.close()
            raise
        if status == "failed":
            self.close()
            raise ScoringError(f"a scoring worker cannot build its tasks: {message}")

    def _send_chunk(self, worker: _Worker, queue: deque[int], pairs: Sequence[tuple[Problem, str]]) -> None:
        # The last chunks are smaller, so that no worker idles while another still has a full one to go.
        size = min(_CHUNK, -(-len(queue) // self._worker_count))
        worker.pending.extend(queue.popleft() for _ in range(size))
        worker.deadline = time.monotonic() + self._timeout_s
        with contextlib.suppress(BrokenPipeError):  # a dead worker is found by _receive
            worker.connection.send([pairs[index] for index in worker.pending])

    def _wait(self) -> list[_Worker]:
        """Busy workers that have answered, died, or run out of time."""
        busy = [worker for worker in self._workers if worker.pending]
        patience = min(worker.deadline for worker in busy) - time.monotonic()
        ready = wait([worker.connection for worker in busy], timeout=max(patience, 0.0))
        now = time.monotonic()
        return [worker for worker in busy if worker.connection in ready or now >= worker.deadline]

    def _receive(
        self,
        worker: _Worker,
        queue: deque[int],
        pairs: Sequence[tuple[Problem, str]],
        results: list[ScoreResult | None],
    ) -> None:
        """Take one answer; or end the worker, blame the item it was busy with and hand the others back."""
        problem_id = pairs[worker.pending[0]][0].problem_id
        try:
            if not worker.connection.poll():
                result = ScoreResult(0.0, "timeout", f"{problem_id}: no score after {self._timeout_s:g} s")
            else:
                status, value = worker.connection.recv()
                results[worker.pending.popleft()] = _as_result(status, value)
                worker.deadline = time.monotonic() + self._timeout_s
                return
        except (EOFError, ConnectionResetError):
            result = ScoreResult(
                0.0, "crash", f"{problem_id}: the scoring process died (exit code {_exit_code(worker)})"
            )
        results[worker.pending.popleft()] = result
        queue.extendleft(reversed(worker.pending))
        self._workers.remove(worker)
        _end(worker)


def _as_result(status: str, value: Any) -> ScoreResult:
    if status == "reward":
        return ScoreResult(value)
    return ScoreResult(0.0, "invalid" if status == "invalid" else "error", value)


def _worker_environment() -> dict[str, str]:
    """The trainer's environment, made fit for a small process beside it."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)  # the same modules importable
    environment["CUDA_VISIBLE_DEVICES"] = ""  # grading must not open a context on the trainer's GPU
    environment["OMP_NUM_THREADS"] = "1"
    return environment


def _exit_code(worker: _Worker) -> int | str:
    try:
        return worker.process.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        return "unknown"


def _end(worker: _Worker) -> None:
    worker.connection.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        _end(workers.pop())
