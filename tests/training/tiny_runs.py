"""Short real training runs for tests: a tiny policy with its tokenizer, and the example script on some ranks."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import psutil

from megatron_dppo.tasks.config import TaskConfig
from tests.forked_ranks import StartedScript, run_script, start_script
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "pretrain_dppo.py"
QUICK_SCRIPT = Path(__file__).with_name("quick_run_script.py")
QUICKSTART = ROOT / "examples" / "conf" / "quickstart.yaml"
# Wall-clock figures differ between runs; everything else is a function of the seed.
TIMED = ("time/", "throughput/", "memory/")
# Engine and policy compute the same fp32 network in another order of sums. A logit carries some tens of roundings, 5e-6 in
# all (tests/rollout/engine_contract.py); the mean over tokens is below that, 4e-7 in the quick start. A seam that does not
# fit, a wrong position or stale weights, costs 1e-3 and more.
MISMATCH = 5e-6


def write_tiny_policy(folder: Path) -> Path:
    """The quick start's policy, as its script makes it."""
    make = runpy.run_path(str(ROOT / "tools" / "setup" / "make_tiny_policy.py"))["make_tiny_policy"]
    make(folder, [TaskConfig(name="spell_backward")])
    return folder


def training_arguments(policy: Path, runs: Path, name: str, *overrides: str) -> list[str]:
    """Of the example script: the quick start with overrides."""
    settings = [f"model.path={policy}", f"run.root={runs}", f"run.name={name}", "checkpoint.export_hf=false"]
    return ["--config", str(QUICKSTART), *settings, *overrides]


def launch_training(policy: Path, runs: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    """Start the quick start with overrides as a user does, by torchrun: each rank imports everything anew."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, str(SCRIPT), *training_arguments(policy, runs, name, *overrides)],
        cwd=runs,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start_training(policy: Path, runs: Path, name: str, *overrides: str) -> StartedScript:
    """Start the quick start with overrides on two forked ranks; the caller waits for its end or kills it."""
    arguments = training_arguments(policy, runs, name, *overrides)
    return start_script(SCRIPT, arguments, ranks=2, folder=runs, timeout=500)


def processes_of(run: StartedScript) -> list[psutil.Process]:
    """The ranks and everything below them that is there now."""
    ranks = [psutil.Process(rank.pid) for rank in run.processes]
    return [*ranks, *(process for rank in ranks for process in rank.children(recursive=True))]


def kill(run: StartedScript) -> None:
    """SIGKILL all of them."""
    processes = processes_of(run)
    for process in processes:
        process.kill()
    run.ends()
    psutil.wait_procs(processes, timeout=60)


def train(
    policy: Path, runs: Path, name: str, *overrides: str, script: Path = QUICK_SCRIPT, timeout: float = 280
) -> list[dict]:
    """Run to the end, on two forked ranks; returns the records of metrics.jsonl."""
    arguments = training_arguments(policy, runs, name, *overrides)
    code, output = run_script(script, arguments, ranks=2, folder=runs, timeout=timeout)
    assert code == 0, output[-4000:]
    return read_metrics(runs / name)


def read_metrics(run: Path) -> list[dict]:
    """The records of a run, step 0 included."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().split(b"\n") if line]


def deterministic_part(record: dict) -> dict:
    """What the same configuration reports bit for bit in every run."""
    return {name: value for name, value in record.items() if not name.startswith(TIMED)}


def wait_for_step(run: Path, step: int, within_s: float = 240.0) -> None:
    """Return when a running run has logged ``step``."""
    metrics = run / "metrics.jsonl"
    wait_until(
        lambda: metrics.exists() and any(record["step"] >= step for record in read_metrics(run)),
        within_s=within_s,
        what=f"step {step} of {run}",
    )
