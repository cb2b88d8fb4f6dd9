"""A job on Slurm: its script written into the run's folder, and handed to sbatch."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from megatron_dppo.errors import ConfigError, LaunchError
from megatron_dppo.launch.job import Job
from megatron_dppo.launch.slurm_script import batch_script

_SUBMIT_TIMEOUT_S = 120.0


def script_path(job: Job) -> Path:
    """Where the script is kept."""
    return job.folder / "job.sbatch"


def rendered(job: Job) -> str:
    """What would be written and run."""
    return f"# {script_path(job)}\n{batch_script(job)}\n# command\n{shlex.join(_command(job))}\n"


def check_here() -> None:
    """Raise ConfigError if nothing can be submitted from this host."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "launch.executor=slurm, but there is no sbatch on this host: give the command on a login node of the cluster, or"
            " add --dry-run to see the script"
        )


def submit(job: Job) -> str:
    """Returns the number of the job. Raises LaunchError if Slurm refuses it."""
    script_path(job).touch(mode=0o600)  # what launch.env says is not for everybody
    script_path(job).write_text(batch_script(job), encoding="utf-8")
    try:
        answer = subprocess.run(
            _command(job), capture_output=True, text=True, timeout=_SUBMIT_TIMEOUT_S, cwd=job.directory
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"sbatch has not answered for {_SUBMIT_TIMEOUT_S:g} s") from error
    if answer.returncode != 0:
        raise LaunchError(f"sbatch refused {script_path(job)}: {answer.stderr.strip()}")
    return answer.stdout.strip().partition(";")[0]


def _command(job: Job) -> list[str]:
    return ["sbatch", "--parsable", str(script_path(job))]
