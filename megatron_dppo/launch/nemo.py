"""A job handed to Slurm by NeMo-Run (extra ``launch``): its experiments and tunnels, our script.

NeMo-Run writes the ``#SBATCH`` lines from its executor and runs our script as its ``setup_lines``, which do not return: its
own has no trap for Slurm's warning, starts every component 30 s after the one before, kills the others 60 s after the first
has ended, and hands a job back to the queue whatever it ended with.
"""

from __future__ import annotations

from typing import Any

from megatron_dppo.compat.extras import from_extra
from megatron_dppo.errors import LaunchError
from megatron_dppo.launch.environment import SERVER, TRAINER
from megatron_dppo.launch.job import Job
from megatron_dppo.launch.slurm_script import batch_body, component_options

_NEVER_REACHED = "exit 1 # the script above has ended the job"
# Options that NeMo-Run's executor has a field for; it may not get them twice.
_FIELDS = {"account", "partition", "time", "nodes", "ntasks-per-node", "gpus-per-node", "gres", "exclusive", "signal"}


def submit(job: Job, *, dry_run: bool) -> str:
    """Returns the experiment's number. Raises MissingDependencyError, LaunchError. ``dry_run``: prints the script instead."""
    with from_extra("launch"):
        import nemo_run
    executors = [_executor(nemo_run, job, TRAINER)]
    if job.serving and job.launch.slurm.heterogeneous:
        executors.append(_executor(nemo_run, job, SERVER))
    tasks = [nemo_run.Script(inline=_NEVER_REACHED) for _ in executors]
    with nemo_run.Experiment(job.name) as experiment:
        if len(executors) == 1:
            experiment.add(tasks[0], executor=executors[0], name=job.name)
        else:
            experiment.add(tasks, executor=executors, name=job.name)
        if dry_run:
            experiment.dryrun(delete_exp_dir=True)
            return ""
        try:
            experiment.run(detach=True)
        except Exception as error:  # whatever its tunnel raises: invoke's, the shell's, Slurm's
            raise LaunchError(f"NeMo-Run could not submit the job: {error}") from error
        return str(experiment._id)


def _executor(nemo_run: Any, job: Job, role: str) -> Any:
    options = dict(option.removeprefix("--").partition("=")[::2] for option in component_options(job, role))
    for name in ("job-name", "output", "open-mode"):  # NeMo-Run's own
        options.pop(name)
    known = {name: options.pop(name) for name in _FIELDS & options.keys()}
    return nemo_run.SlurmExecutor(
        account=known.get("account"),
        partition=known.get("partition"),
        time=known["time"],
        nodes=int(known["nodes"]),
        ntasks_per_node=1,
        gpus_per_node=int(known["gpus-per-node"]) if "gpus-per-node" in known else None,
        gres=known.get("gres"),
        exclusive="exclusive" in known or None,
        signal=known.get("signal"),
        additional_parameters={name.replace("-", "_"): value or True for name, value in options.items()},
        heterogeneous=bool(job.serving) and job.launch.slurm.heterogeneous,
        job_name_prefix="dppo-",
        setup_lines="set +evx\n" + batch_body(job),
        tunnel=nemo_run.LocalTunnel(job_dir=""),  # NeMo-Run's own folder of experiments
        packager=nemo_run.Packager(),
    )
