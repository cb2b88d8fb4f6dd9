"""The generated job on a real Slurm: three nodes of Debian's packages on this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.jobs import QUICKSTART, ROOT
from tests.training.tiny_runs import read_metrics, wait_for_step, write_tiny_policy
from tests.waiting import wait_until

SCRIPT = ROOT / "tools" / "check" / "slurm_on_one_machine.sh"
_MISSING = [
    name
    for name in ("slurmctld", "slurmd", "munged", "sbatch")
    if shutil.which(name, path=os.defpath + ":/usr/sbin") is None
]
# On every push: tests/launch/test_slurm_script.py, with stand-ins for Slurm's commands.
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(_MISSING), reason=f"{', '.join(_MISSING)}: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd and munged are started as root"),
]


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        self.environment["PATH"] += ":/usr/sbin"

    def run(self, *command: str, timeout: float = 120) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def launch(self, *overrides: str) -> str:
        command = [sys.executable, "-m", "megatron_dppo", "launch", "--recipe", str(QUICKSTART), "cluster=slurm"]
        output = self.run(*command, *overrides)
        return re.findall(r"^submitted: (\d+)$", output, re.MULTILINE)[0]

    def state(self, job: str) -> str:
        return re.findall(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))[0]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path)
    try:
        slurm.run("bash", str(SCRIPT), "up", str(tmp_path))
        yield slurm
    finally:
        slurm.run("bash", str(SCRIPT), "down", str(tmp_path))


SMALL = (
    "run.name=run",
    "launch.trainer_nodes=2",
    "launch.processes_per_node=1",
    "launch.slurm.time=20",
    "launch.warning_s=60",
    "warm_start.steps=5",
    "rollout.prompts_per_step=4",
    "eval.prompts=8",
    "eval.every=0",
    "checkpoint.every=0",
    "checkpoint.export_hf=false",
    "logging.tensorboard=false",
)


@pytest.mark.sglang
def test_a_heterogeneous_job_that_is_warned_saves_is_requeued_and_goes_on(slurm, tmp_path) -> None:
    """The warning is sent as Slurm sends its own, to the batch shell; its own, minutes later, is in dev/LOG.md."""
    policy = write_tiny_policy(tmp_path / "policy")
    serving = ("rollout.engine=sglang", "launch.server_nodes=1")
    job = slurm.launch(*SMALL, *serving, f"model.path={policy}", "train.steps=60")
    run = tmp_path / "runs" / "run"
    wait_for_step(run, 2)
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: slurm.state(job) == "PENDING", within_s=120, what="it is back in the queue")
    done = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    wait_until(lambda: slurm.state(job) in done, within_s=900, every_s=1, what="it ends")
    log = (run / "launch" / f"slurm-{job}.log").read_text()
    assert slurm.state(job) == "COMPLETED", log
    assert log.count("ended with exit code 75") == 1
    resumed = (run / "launch" / f"slurm-{job}" / "start-2" / "trainer-0.log").read_text()
    assert "resuming from" in resumed
    assert [record["step"] for record in read_metrics(run)] == list(range(61))


def test_a_job_that_is_cancelled_saves_and_is_not_requeued(slurm, tmp_path) -> None:
    policy = write_tiny_policy(tmp_path / "policy")
    job = slurm.launch(*SMALL, f"model.path={policy}", "train.steps=2000", "launch.slurm.heterogeneous=false")
    run = tmp_path / "runs" / "run"
    wait_for_step(run, 2)
    slurm.run("scancel", job)
    wait_until(lambda: slurm.state(job) == "CANCELLED", within_s=120, what="it is cancelled")
    log = run / "launch" / f"slurm-{job}.log"
    wait_until(lambda: "ended with exit code" in log.read_text(), within_s=120, what="its script ends")
    assert "back to the queue" not in log.read_text()
    assert list((run / "checkpoints").glob("step_*"))
