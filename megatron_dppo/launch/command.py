"""Start a run: ``megatron-dppo launch --recipe R cluster=slurm key.sub=value ...``.

The recipe says what is trained, its section ``launch`` where: on this machine (cluster=local), as a job of Slurm
(cluster=slurm), or as a manifest for Kubernetes (cluster=kubernetes, with --dry-run). Trainer nodes and serving nodes are one
job. A run that is asked to stop (by Slurm's warning before the time is over, or a SIGTERM to one of its processes) writes a
checkpoint and is started again from it.

    megatron-dppo launch --recipe examples/conf/quickstart.yaml run.name=first
    megatron-dppo launch --recipe examples/conf/qwen3_30b_a3b.yaml cluster=slurm launch.slurm.account=me --dry-run

--dry-run prints the exact script or commands, and the reason for every environment variable; nothing is written or started.
docs/launching.md has the rest.

Exit code on this machine: that of the run (megatron-dppo train --help). On Slurm 0 as soon as the job is in the queue. 2: the
input cannot work, one message says why; 3: Slurm refused the job.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dppo.errors import BAD_INPUT, EXIT_BAD_INPUT, EXIT_STOPPED, ConfigError, LaunchError

if TYPE_CHECKING:
    from megatron_dppo.launch.config import Recipe
    from megatron_dppo.launch.job import Job


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-dppo launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, help="a file, or the name of one in examples/conf/recipe")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started; start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides, cluster=NAME")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse_arguments(arguments)
    try:
        return launch(options.recipe, options.overrides, dry_run=options.dry_run)
    except (*BAD_INPUT, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_STOPPED


def launch(name: str, overrides: list[str], *, dry_run: bool) -> int:
    """Start the run of a recipe, or print how. Returns the exit code. Raises one of BAD_INPUT, OSError or LaunchError."""
    from megatron_dppo.launch.job import describe  # help needs no torch
    from megatron_dppo.launch.recipes import load_recipe

    recipe = load_recipe(name, overrides)
    if recipe.run.name is None:
        recipe.run.name = f"{Path(name).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    job = describe(recipe)
    if dry_run:
        _show(job)
        return 0
    return _start(recipe, job)


def _show(job: Job) -> None:
    from megatron_dppo.launch import kubernetes, local_commands, nemo, slurm

    if job.launch.executor == "slurm" and job.launch.slurm.submit == "nemo_run":
        nemo.submit(job, dry_run=True)
        return
    rendered = {"local": local_commands.local_commands, "slurm": slurm.rendered, "kubernetes": kubernetes.manifest}
    print(rendered[job.launch.executor](job), end="")


def _start(recipe: Recipe, job: Job) -> int:
    from megatron_dppo.launch import nemo, slurm

    if job.launch.executor == "kubernetes":
        raise ConfigError(
            "launch.executor=kubernetes: the manifest is only written; add --dry-run and kubectl apply -f it"
        )
    if job.launch.executor == "local":
        return _run_here(recipe, job)
    slurm.check_here()
    _keep(recipe, job)
    number = nemo.submit(job, dry_run=False) if job.launch.slurm.submit == "nemo_run" else slurm.submit(job)
    print(f"submitted: {number}\nlogs will be in {job.folder}", flush=True)
    return 0


def _run_here(recipe: Recipe, job: Job) -> int:
    from megatron_dppo.launch.local import LocalJob

    local_job = LocalJob(job)
    _keep(recipe, job)
    os.chdir(job.directory)
    return local_job.run()


def _keep(recipe: Recipe, job: Job) -> None:
    """Write the configuration that all starts of the job read. The first one decides about ``run.resume=never``."""
    from megatron_dppo.training.config.load import save_config
    from megatron_dppo.training.metrics.run_folder import RunFolder

    RunFolder(dataclasses.replace(recipe.run, root=str(job.run_folder.parent), name=job.run_folder.name)).check()
    if recipe.run.resume == "never" and (job.run_folder / "config.yaml").exists():
        raise ConfigError(
            f"{job.run_folder} holds a run already: choose another run.name, or run.resume=auto to continue it"
        )
    job.folder.mkdir(parents=True, exist_ok=True)
    job.config_path.touch(mode=0o600)  # what launch.env says is not for everybody
    save_config(dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, resume="auto")), job.config_path)
