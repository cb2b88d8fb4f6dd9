"""The batch script of a job on Slurm.

It starts servers and trainer as steps of one allocation, asks the run to save when Slurm warns that the time is nearly over,
and hands the job back to the queue if the run has saved and wants to go on (exit code 75). It ends with the run's exit code.

Requests to stop go through a file that the trainer's agents look for, and the end of the servers through their standard
input: a signal that srun hands on reaches every process of a step, also helpers that it kills.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_dppo.errors import EXIT_BAD_INPUT, EXIT_START_AGAIN, EXIT_STOPPED, ConfigError
from megatron_dppo.launch.config import LaunchConfig
from megatron_dppo.launch.environment import SERVER, TRAINER
from megatron_dppo.launch.job import Job, Serving, Shell

_FIRST_PORT, _PORTS = 20000, 10000  # below those that systems give away to the near end of connections
_UNQUOTABLE = set(" \t\n\"'\\%$`")

_FUNCTIONS = """\
# The exit code of child $1, however often signals interrupt the wait.
ended_with() {
  local code again
  wait "$1"
  code=$?
  while ((code > 128)) && kill -0 "$1" 2>/dev/null; do
    wait "$1"
    code=$?
  done
  wait "$1" 2>/dev/null # if the last signal came as it ended, this knows how
  again=$?
  ((again != 127)) && code=$again
  return "$code"
}

# The addresses of the nodes of list $1, as Slurm itself reaches them.
addresses() {
  local node
  for node in $(scontrol show hostnames "$1"); do
    scontrol --oneliner show node "$node" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p'
  done
}
"""


def batch_script(job: Job) -> str:
    """The whole script, as sbatch takes it."""
    origin = "# Written by `megatron-dppo launch`."
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {line}" for line in _header(job)), "", origin, batch_body(job)])


def _header(job: Job) -> list[str]:
    lines = component_options(job, TRAINER)
    if job.serving and job.launch.slurm.heterogeneous:
        lines += ["hetjob", *component_options(job, SERVER)]
    return lines


def component_options(job: Job, role: str) -> list[str]:
    """What is asked for the nodes of a role; without heterogeneous jobs TRAINER's are those of all nodes.

    Raises ConfigError if the run's folder has a name that such a line cannot hold.
    """
    launch, slurm = job.launch, job.launch.slurm
    nodes = launch.trainer_nodes
    if role == SERVER:
        nodes = launch.server_nodes
    elif not slurm.heterogeneous:
        nodes += launch.server_nodes
    partition = slurm.server_partition if role == SERVER and slurm.server_partition else slurm.partition
    output = str(job.folder / "slurm-%j.log")
    if _UNQUOTABLE & set(str(job.folder)):
        raise ConfigError(
            f"{job.folder} cannot be named in a batch script: choose run.root and run.name without blanks, quotes, %, $, \\"
        )
    options = [f"--job-name={job.name}", f"--nodes={nodes}", "--ntasks-per-node=1"]
    options += [f"--{name}={value}" for name, value in (("account", slurm.account), ("partition", partition)) if value]
    options += _gpu_options(launch)
    options += ["--exclusive"] if slurm.exclusive else []
    options += [f"--time={slurm.time}", f"--output={output}", "--open-mode=append"]
    if role == TRAINER:  # of the batch shell, which the first component has; and of the job as a whole
        options += [f"--signal=B:USR1@{launch.warning_s}", "--requeue"]
    return [*options, *slurm.options]


def _gpu_options(launch: LaunchConfig) -> list[str]:
    if not launch.gpus_per_node:
        return []
    if launch.slurm.gpu_option == "gres":
        return [f"--gres=gpu:{launch.gpus_per_node}"]
    return [f"--gpus-per-node={launch.gpus_per_node}"]


def batch_body(job: Job) -> str:
    """The script without its options: also what NeMo-Run's script is made to run."""
    blocks = [
        _beginning(job),
        _FUNCTIONS,
        _meeting(job),
        _environment(job, TRAINER),
        _trainer(job),
        *([_environment(job, SERVER), _servers(job, job.serving)] if job.serving else []),
        _end(job),
    ]
    return "\n".join(blocks)


def _beginning(job: Job) -> str:
    return f"""\
set -u
start=$((${{SLURM_RESTART_COUNT:-0}} + 1))
attempt={shlex.quote(str(job.folder))}/slurm-$SLURM_JOB_ID/start-$start
mkdir -p "$attempt" || exit 1
cd {shlex.quote(str(job.directory))} || exit {EXIT_BAD_INPUT}
echo "start $start of job $SLURM_JOB_ID: logs are in $attempt"

# USR1: the time is nearly over. TERM: cancelled or preempted, and Slurm itself decides whether the job goes on.
ended=
trap ': >"$attempt/stop"' USR1
trap 'ended=1; : >"$attempt/stop"' TERM INT
"""


def _meeting(job: Job) -> str:
    port = str(job.launch.port) if job.launch.port else f"$(({_FIRST_PORT} + 2 * (SLURM_JOB_ID % {_PORTS // 2})))"
    lines = [
        f"port={port}",
        'nodes=$(addresses "${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}")',
        'head=$(head -n 1 <<<"$nodes")',
        '[ -n "$head" ] || { echo "scontrol does not know the addresses of $SLURM_JOB_NODELIST" >&2; exit 1; }',
    ]
    if job.serving and job.serving.nodes_per_server > 1:
        if job.launch.slurm.heterogeneous:
            lines.append('server_nodes=$(addresses "$SLURM_JOB_NODELIST_HET_GROUP_1")')
        else:
            lines.append(f'server_nodes=$(tail -n {job.serving.nodes} <<<"$nodes")')
        lines.append("server_addresses=${server_nodes//$'\\n'/,}")
    return "\n".join([*lines, ""])


def _environment(job: Job, role: str) -> str:
    lines = [
        f"  {shlex.quote(f'{variable.name}={variable.value}')} # {variable.reason}"
        for variable in job.environment[role]
    ]
    return "\n".join([f"{role}_environment=(", *lines, ")"])


def _trainer(job: Job) -> str:
    command = job.trainer_command(
        head=Shell('"$head"'),
        port=Shell('"$port"'),
        attempt=Shell('"$attempt"'),
        node_rank=["--node-rank-variable", "SLURM_PROCID"],
    )
    return _array("trainer", command)


def _servers(job: Job, serving: Serving) -> str:
    sharing: list[str] = []
    if serving.nodes_per_server > 1:
        place = ["--addresses", Shell('"$server_addresses"'), "--port", Shell('"$((port + 1))"')]
        sharing = ["--node-variable", "SLURM_PROCID", "--nodes-per-server", str(serving.nodes_per_server), *place]
    command = job.server_command(attempt=Shell('"$attempt"'), arguments=["--until-eof"], sharing=sharing)
    step = _step(job, SERVER, serving.nodes)
    return f"""\
{_array("server", command)}

# They serve until the pipe to their standard input is closed. If they end before, the run is asked to save and stop.
serve() {{
  {step} --input=all \\
    env "${{server_environment[@]}}" "${{server[@]}}"
  echo $? >"$attempt/servers.exit"
  : >"$attempt/stop"
}}
exec {{servers}}> >(trap '' TERM INT USR1; serve)
servers_pid=$!
"""


def _end(job: Job) -> str:
    step = _step(job, TRAINER, job.launch.trainer_nodes)
    close = " {servers}>&-" if job.serving else ""
    return f"""\
# --wait: after the first node has ended the others do so by themselves, each with its own exit code.
{step} --kill-on-bad-exit=0 --wait=60 \\
  env "${{trainer_environment[@]}}" "${{trainer[@]}}" </dev/null{close} &
ended_with $!
code=$?
# srun knows the largest exit code of all nodes only; each node has written its own.
for likely in {EXIT_START_AGAIN} {EXIT_BAD_INPUT} {EXIT_STOPPED} 1; do
  grep -qsx "$likely" "$attempt"/trainer-*.exit && code=$likely && break
done
{_end_of_servers() if job.serving else ""}
echo "start $start of job $SLURM_JOB_ID ended with exit code $code"
if [ "$code" = {EXIT_START_AGAIN} ] && [ -z "$ended" ]; then
  if ((start > {job.launch.max_restarts})); then
    echo "launch.max_restarts = {job.launch.max_restarts}: not started again"
  else
    echo "back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
"""


def _end_of_servers() -> str:
    return """\
[ -s "$attempt/servers.exit" ] && failed=$(<"$attempt/servers.exit") || failed=0
exec {servers}>&-
ended_with "$servers_pid"
if ((failed != 0)) && [ -z "$ended" ]; then
  echo "the servers ended first, with exit code $failed: see $attempt/server-*.log" >&2
  code=$failed
fi"""


def _step(job: Job, role: str, nodes: int) -> str:
    """The srun command of a role's nodes, up to what it runs."""
    launch = job.launch
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    if job.serving and launch.slurm.heterogeneous:
        options.append(f"--het-group={0 if role == TRAINER else 1}")
    elif job.serving:
        options.append(f"--relative={0 if role == TRAINER else launch.trainer_nodes}")
    if launch.container.image:
        options += ["--no-container-mount-home", f"--container-image={launch.container.image}"]
        options.append(f"--container-workdir={job.directory}")
    if launch.container.mounts:
        options.append(f"--container-mounts={','.join(launch.container.mounts)}")
    return f'srun {shlex.join(options)} --output="$attempt/{role}-%t.log"'


def _array(name: str, words: Sequence[str]) -> str:
    """A command as a bash array, broken before options."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--") and lines[-1]:
            lines.append([])
        lines[-1].append(word if isinstance(word, Shell) else shlex.quote(word))
    return "\n".join([f"{name}=(", *(f"  {' '.join(line)}" for line in lines), ")"])
