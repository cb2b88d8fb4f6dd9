"""Makes the runs of the study: policies and their warm starts once, then each run as a process on a core of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.stability_study.plan import PlannedRun, Study
from examples.stability_study.records import AT_THE_END, line_of

ROOT = Path(__file__).resolve().parents[2]
_STOPPED = 3  # of examples/pretrain_dppo.py: gradients or rollouts are of no use any more, which is a result here
_PATIENCE = 10  # times the expected seconds until a run is taken to hang


class FailedRunError(RuntimeError):
    """A run ended for a reason that says nothing about its method."""


class Workshop:
    """Makes warm starts and runs below one folder, for one study. ``make`` may be called by several threads."""

    def __init__(self, study: Study, runs: Path, commit: str, overrides: list[str]) -> None:
        """``overrides``: of every run, after its own."""
        self._study = study
        self._runs = runs.resolve()
        self._commit = commit
        self._overrides = overrides
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._ended = False
        self._runs_on = dict.fromkeys(sorted(os.sched_getaffinity(0)), 0)  # core -> processes

    @property
    def expected_s(self) -> float:
        """Seconds that a run takes."""
        return self._study.seconds_per_run

    def warm_start(self, policy: str) -> dict[str, Any] | None:
        """Make the warm-started policy that runs begin from; its record, or None if it was there."""
        run = self._study.warm_starts[policy]
        if (self._runs / run.name / "hf" / "config.json").exists():
            return None
        fresh = self._runs / f"policy-{policy}"
        maker = [str(ROOT / "tools" / "setup" / "make_tiny_policy.py"), *self._study.policies[policy]]
        self._run_to_its_end([*maker, "--task", "spell_backward", "--output", str(fresh)], f"policy {policy}")
        return self._train(run, fresh, allowed=(0,))

    def make(self, run: PlannedRun) -> dict[str, Any]:
        """Make a run, anew if it was interrupted, and return its record. Raises FailedRunError."""
        policy = self._runs / self._study.warm_starts[run.policy].name / "hf"
        return self._train(run, policy, allowed=(0, _STOPPED))

    def end_all(self) -> None:
        """End every process that was started, and start no more."""
        with self._lock:
            self._ended = True
            processes = list(self._processes)
        for process in processes:
            _kill(process)

    def _train(self, run: PlannedRun, policy: Path, allowed: tuple[int, ...]) -> dict[str, Any]:
        folder = self._runs / run.name
        shutil.rmtree(folder, ignore_errors=True)
        start = time.monotonic()
        script = str(ROOT / "examples" / "pretrain_dppo.py")
        place = (f"run.root={self._runs}", f"run.name={run.name}", f"model.path={policy}")
        settings = (*place, *run.overrides, *self._overrides)
        code, message = self._run_to_its_end([script, "--config", str(self._study.conf), *settings], run.name, allowed)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 300 of them would fill a disk; a run takes a minute
        ended = AT_THE_END if code == 0 else message
        return line_of(run, folder, commit=self._commit, ended=ended, seconds=time.monotonic() - start)

    def _run_to_its_end(self, command: list[str], name: str, allowed: tuple[int, ...] = (0,)) -> tuple[int, str]:
        """Exit code and last line of error of a Python script. FailedRunError for codes that are not ``allowed``."""
        with self._lock:
            if self._ended:
                raise FailedRunError(f"{name} was not begun: the study is being stopped")
            core = min(self._runs_on, key=lambda core: self._runs_on[core])
            self._runs_on[core] += 1
            with _thread_on(core):  # the process inherits it
                process = subprocess.Popen(
                    [sys.executable, *command],
                    env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            self._processes.add(process)
        try:
            output, _ = process.communicate(timeout=_PATIENCE * self.expected_s)
        except subprocess.TimeoutExpired:
            raise FailedRunError(f"{name} did not end within {_PATIENCE * self.expected_s:.0f} s") from None
        finally:
            _kill(process)
            with self._lock:
                self._processes.discard(process)
                self._runs_on[core] -= 1
        if process.returncode not in allowed:
            raise FailedRunError(f"{name} ended with exit code {process.returncode}:\n{output[-3000:]}")
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        return process.returncode, errors[-1] if errors else ""


@contextmanager
def _thread_on(core: int) -> Iterator[None]:
    """Within, the calling thread and what it starts runs on one core.

    A rank takes as many threads as it may use cores, and the threads of two runs on the same two cores wait for each other
    in every operator: a step of the pilot took 36 s, and 4 s with a core for each run.
    """
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _kill(process: subprocess.Popen[str]) -> None:
    """The process and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
