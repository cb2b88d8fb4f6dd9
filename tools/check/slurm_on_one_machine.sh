#!/bin/bash
# A real Slurm of three nodes on one machine, in a folder, and what `megatron-dppo launch` makes of it.
#
#   apt-get install --no-install-recommends slurm-wlm munge
#   tools/check/slurm_on_one_machine.sh up FOLDER      # starts munged, slurmctld and three slurmd; as root, without systemd
#   export SLURM_CONF=FOLDER/slurm.conf                # for sbatch, squeue, scancel, ...
#   tools/check/slurm_on_one_machine.sh down FOLDER    # cancels all jobs and ends what `up` started
#   tools/check/slurm_on_one_machine.sh run FOLDER     # up, one heterogeneous job, down; needs MEGATRON_DPPO_SGLANG_PYTHON
#
# `run` trains the quick start's policy on two nodes, with a real SGLang server on a third, under a time limit that is too
# short: Slurm's warning, the checkpoint, the requeue and the resume are then in the log that it prints. Slurm starts a job
# again two minutes after its requeue. Some twenty minutes in all. tests/launch/test_slurm.py uses `up` and `down`.
set -euo pipefail

here=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}

configuration() {
  cat <<END
ClusterName=one_machine
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
SlurmctldPort=${SLURM_PORT:-16817}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
MinJobAge=3600
KillWait=30
JobRequeue=1
NodeName=n[1-3] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((${SLURM_PORT:-16817} + 1))-$((${SLURM_PORT:-16817} + 3)) CPUs=$(nproc) RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n[1-3] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
END
}

up() {
  mkdir -p "$folder/state"
  configuration | sed -E 's/Port=([0-9]+)-([0-9]+) /Port=[\1-\2] /' >"$folder/slurm.conf"
  if ! munge -n >/dev/null 2>&1; then
    mkdir -p /run/munge
    chown munge: /run/munge /etc/munge /var/log/munge /var/lib/munge
    chmod 755 /run/munge
    runuser -u munge -- /usr/sbin/munged
    cp /run/munge/munged.pid "$folder/munged.pid"
  fi
  for node in n1 n2 n3; do
    mkdir -p "$folder/spool.$node"
    slurmd -N "$node"
  done
  slurmctld
  for _ in $(seq 300); do
    [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 3 ] && return
    sleep 0.1
  done
  echo "Slurm's nodes are not idle after 30 s: see $folder/slurmctld.log" >&2
  return 1
}

down() {
  scancel --user="$(id -un)" 2>/dev/null || true
  for file in "$folder"/slurmd.*.pid "$folder/slurmctld.pid" "$folder/munged.pid"; do
    [ -s "$file" ] && kill "$(<"$file")" 2>/dev/null || true
  done
}

run() {
  trap down EXIT
  up
  cd "$folder"
  [ -d models/quickstart ] || "$python" "$here/tools/setup/make_tiny_policy.py" --task spell_backward --output models/quickstart
  local submitted job state
  submitted=$("$python" -m megatron_dppo launch --recipe "$here/examples/conf/quickstart.yaml" cluster=slurm run.name=slurm \
    launch.trainer_nodes=2 launch.server_nodes=1 launch.slurm.time=${MINUTES:-8} launch.warning_s=60 \
    rollout.engine=sglang warm_start.steps=5 rollout.prompts_per_step=4 eval.prompts=8 eval.every=0 checkpoint.every=0 \
    checkpoint.export_hf=false logging.tensorboard=false "train.steps=${STEPS:-100}" "${@:-run.seed=1}")
  echo "$submitted"
  job=$(sed -n 's/^submitted: //p' <<<"$submitted")
  while state=$(squeue -h -j "$job" -o %T 2>/dev/null | head -n 1) && [ -n "$state" ]; do
    [ "$state" = "${seen:-}" ] || echo "$(date +%T) job $job: $state"
    seen=$state
    sleep 1
  done
  scontrol show job "$job" | grep -E "JobId|JobState|Restarts|ExitCode|HetJobOffset" || true
  cat runs/slurm/launch/slurm-"$job".log
  grep -hE "resuming from|stopped after|^step [0-9]+/" runs/slurm/launch/slurm-"$job"/start-*/trainer-0.log
}

command=${1:-} folder=$(realpath -m "${2:-.}")
case $command in
  up | down | run)
    [ $# -ge 2 ] || { echo "usage: $0 up|down|run FOLDER" >&2; exit 2; }
    mkdir -p "$folder"
    export SLURM_CONF=$folder/slurm.conf
    shift 2
    "$command" "$@"
    ;;
  *)
    echo "usage: $0 up|down|run FOLDER" >&2
    exit 2
    ;;
esac
