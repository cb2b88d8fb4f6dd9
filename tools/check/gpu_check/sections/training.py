"""A real training run, as a user starts it: the quick start's policy on one device. Its reward must rise."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tools.check.gpu_check.extension import ROOT
from tools.check.gpu_check.findings import Check, Finding, Options

LIMIT_S = {"cuda": 420.0, "cpu": 1800.0}
STEPS, QUICK_STEPS = 40, 25
# Engine and policy compute the same fp32 network in another order of sums (tests/training/tiny_runs.py says more): a seam
# that does not fit costs 1e-3 and more. The quick start asks for model.backend=local on a GPU too.
MISMATCH = 5e-6
_TASK = "name: spelling, kind: custom, path: 'tools.check.gpu_check.spelling_task:SpellingTask'"
_ENDS = 5  # steps at either end that are compared


def checks(options: Options) -> list[Check]:
    """One run; a shorter one with --quick, and on a CPU, where it has half of the prompts."""
    steps = STEPS if options.on_gpu and not options.quick else QUICK_STEPS
    return [
        Check(
            f"the quick start's policy, {steps} steps", lambda: train_and_judge(options, steps), LIMIT_S[options.device]
        )
    ]


def train_and_judge(options: Options, steps: int) -> list[Finding]:
    policy = write_policy(options.scratch / "policy")
    settings = ["parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=1"]
    prompts = 64 if options.on_gpu else 32
    settings += [f"rollout.prompts_per_step={prompts}", f"warm_start.steps={180 if steps == STEPS else 60}"]
    run = train(policy, options, "one_device", 1, f"train.steps={steps}", *settings)
    return judge(read_metrics(run), prompts)


def write_policy(folder: Path) -> Path:
    """The quick start's policy; its tokenizer knows the task's words."""
    from megatron_dppo.tasks.config import TaskConfig
    from tools.setup.make_tiny_policy import make_tiny_policy

    if not folder.exists():
        path = "tools.check.gpu_check.spelling_task:SpellingTask"
        make_tiny_policy(folder, [TaskConfig(name="spelling", kind="custom", path=path, size=500)])
    return folder


def train(policy: Path, options: Options, name: str, ranks: int, *overrides: str) -> Path:
    """Train by the command; returns the run's folder. Raises RuntimeError with its last error if it fails."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    arguments = [
        "megatron_dppo",
        "train",
        *("--config", str(ROOT / "examples" / "conf" / "quickstart.yaml")),
        *(f"model.path={policy}", f"run.root={options.scratch}", f"run.name={name}", f"run.device={options.device}"),
        f"launch.processes_per_node={ranks}",
        *("eval.every=0", "checkpoint.every=0", "checkpoint.export_hf=false", "logging.tensorboard=false"),
        f"tasks.train=[{{{_TASK}, size: 10000, seed: 1}}]",
        f"tasks.eval=[{{{_TASK}, size: 400, seed: 20001}}]",
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    log = options.scratch / f"{name}.log"
    with log.open("w") as output:
        code = subprocess.run(
            [*start, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    said = log.read_text(errors="replace")
    print(said, flush=True)
    if code:
        lines = [line.strip() for line in said.splitlines() if "rror" in line] or ["it named no error"]
        raise RuntimeError(f"exit code {code}: {lines[-1]}")
    return options.scratch / name


def read_metrics(run: Path) -> list[dict]:
    """The records of the training steps."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]
    return [record for record in records if "reward/mean" in record]


def judge(records: list[dict], prompts: int) -> list[Finding]:
    """Whether the reward rose by more than chance, and the rest of what a healthy run has."""
    first, last = (mean_of(steps, "reward/mean") for steps in (records[:_ENDS], records[-_ENDS:]))
    # Responses to a prompt resemble each other: a step counts for as many responses as it has prompts. A difference of two
    # means of five steps is three of its standard errors by chance once in 700 runs.
    deviation = mean_of(records, "reward/std")
    least = 3.0 * math.sqrt(2.0) * deviation / math.sqrt(prompts * _ENDS)
    mismatch = max(record["mismatch/abs_log_ratio"] for record in records)
    step_s = statistics.median(record["time/step_s"] for record in records)
    skipped = sum(record["train/skipped_steps"] for record in records)
    return [
        Finding(
            f"{first:.3f} -> {last:.3f}, first and last {_ENDS} of {len(records)} steps; chance makes less than {least:.3f}",
            last - first > least,
            {"first": first, "last": last, "least_rise": least, "steps": len(records)},
            name="reward",
        ),
        Finding(
            f"largest mean |log pi - log mu| before an update: {mismatch:.1e}",
            mismatch <= MISMATCH,
            {"abs_log_ratio": mismatch},
            name="engine against trainer",
        ),
        Finding(f"{skipped:.0f} skipped", skipped == 0, {"skipped_steps": skipped}, name="optimizer steps"),
        Finding(
            f"{step_s:.2f} s, kernels: {records[-1]['backend']}", None, {"seconds": step_s}, name="median training step"
        ),
    ]


def mean_of(records: list[dict], name: str) -> float:
    """Mean over records."""
    return statistics.fmean(record[name] for record in records)
