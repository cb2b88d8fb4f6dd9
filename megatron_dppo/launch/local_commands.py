"""The commands of a job on this machine, whose nodes share its cores; and how they are shown to people."""

from __future__ import annotations

import os
import shlex

from megatron_dppo.launch.environment import SERVER, TRAINER
from megatron_dppo.launch.job import Job

LOOPBACK = "127.0.0.1"


def local_trainer_command(job: Job, node: int, *, port: str, attempt: str) -> list[str]:
    """See ``Job.trainer_command``. Each node has a part of the cores for itself, as it would have on a host of its own."""
    cores = sorted(os.sched_getaffinity(0))[node :: job.launch.trainer_nodes]
    place = ["--node-rank", str(node)]
    if job.launch.trainer_nodes > 1 and cores:
        place += ["--cores", ",".join(map(str, cores))]
    return job.trainer_command(head=LOOPBACK, port=port, attempt=attempt, node_rank=place)


def local_commands(job: Job) -> str:
    """The commands of a first start, with the reason for each variable of their environment."""
    attempt = str(job.folder / "local-TIME-PID" / "start-1")
    port = str(job.launch.port or "PORT")
    blocks = [f"cd {shlex.quote(str(job.directory))}"]
    if job.serving:
        blocks.append(_block("all servers", job, SERVER, job.all_servers_command(attempt=attempt, address=LOOPBACK)))
    for node in range(job.launch.trainer_nodes):
        command = local_trainer_command(job, node, port=port, attempt=attempt)
        blocks.append(_block(f"trainer node {node}", job, TRAINER, command))
    return "\n\n".join(blocks) + "\n"


def _block(title: str, job: Job, role: str, command: list[str]) -> str:
    variables = job.environment[role]
    reasons = [f"#   {variable.name}: {variable.reason}" for variable in variables]
    words = ["env", *(f"{variable.name}={variable.value}" for variable in variables), *command]
    return "\n".join([f"# {title}", *reasons, shlex.join(words)])
