"""What a job on this machine would run, in words that a shell takes."""

from __future__ import annotations

import shlex

from megatron_dppo.launch.environment import SERVER, TRAINER
from megatron_dppo.launch.job import Job

_HERE = "127.0.0.1"


def local_commands(job: Job) -> str:
    """The commands of a first start, with the reason for each variable of their environment."""
    attempt = str(job.folder / "local-TIME-PID" / "start-1")
    port = str(job.launch.port or "PORT")
    blocks = [f"cd {shlex.quote(str(job.directory))}"]
    if job.serving:
        blocks.append(_block("all servers", job, SERVER, job.all_servers_command(attempt=attempt, address=_HERE)))
    for node in range(job.launch.trainer_nodes):
        command = job.trainer_command(head=_HERE, port=port, attempt=attempt, node_rank=["--node-rank", str(node)])
        blocks.append(_block(f"trainer node {node}", job, TRAINER, command))
    return "\n\n".join(blocks) + "\n"


def _block(title: str, job: Job, role: str, command: list[str]) -> str:
    variables = job.environment[role]
    reasons = [f"#   {variable.name}: {variable.reason}" for variable in variables]
    words = ["env", *(f"{variable.name}={variable.value}" for variable in variables), *command]
    return "\n".join([f"# {title}", *reasons, shlex.join(words)])
