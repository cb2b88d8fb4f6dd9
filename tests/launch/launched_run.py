"""`megatron-dppo launch` as a user gives it, on this machine, with the quick start's policy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.launch.jobs import QUICKSTART, ROOT
from tests.waiting import wait_until

ONE_RANK = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.expert_model_parallel_size=1",
    "launch.processes_per_node=1",
)


class LaunchedRun:
    """Started when it is made. Its run is called "run"."""

    def __init__(self, policy: Path, folder: Path, *overrides: str) -> None:
        """``folder``: where the command is given."""
        self.folder = folder
        self.run = folder / "runs" / "run"
        settings = [f"model.path={policy}", "run.name=run", "checkpoint.export_hf=false", "logging.tensorboard=false"]
        command = [sys.executable, "-m", "megatron_dppo", "launch", "--recipe", str(QUICKSTART), *settings, *overrides]
        self.log = folder / f"launch-{len(list(folder.glob('launch-*.log')))}.log"
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ends(self, within_s: float) -> tuple[int, str]:
        """Its exit code, and all that it said."""
        return self.process.wait(timeout=within_s), self.log.read_text()

    def processes(self, marked: str) -> list[psutil.Process]:
        """Those of this run's processes whose command line has ``marked`` in it; guards are not among them."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = " ".join(process.info["cmdline"] or [])
            if str(self.folder) in words and marked in words and "guard.py" not in words:
                found.append(process)
        return found

    def wait_for(self, marked: str, within_s: float = 120) -> psutil.Process:
        """The first of ``processes``, as soon as there is one."""

        def found() -> list[psutil.Process]:
            assert self.process.poll() is None, self.log.read_text()
            return self.processes(marked)

        return wait_until(found, within_s=within_s, what=f"{marked} runs")[0]

    def left(self) -> list[str]:
        """Command lines of processes that the run has started and that are still there."""
        left = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            mark = (process.info["environ"] or {}).get("MEGATRON_DPPO_ATTEMPT", "")
            if mark.startswith(str(self.folder)):
                left.append(" ".join(process.info["cmdline"] or []))
        return left
