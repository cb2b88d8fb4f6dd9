"""Small things that have to work: one step of training, and one with a real server, to which weights are sent and proven.

Both are the command ``train`` in a process of its own, as a user starts it: it generates, scores, updates, sends the weights.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from megatron_dppo.launch.doctor.lines import Line, Subject

TRAIN_S, SYNC_S = 240.0, 540.0
_ENDING_S = 20.0  # that a run has to end its servers
_CONFIG = """
run: {{name: trial, root: {folder}, resume: never}}
model: {{path: {folder}/policy, dtype: fp32, chat: false}}
rollout: {{prompts_per_step: 2, samples_per_prompt: 2, max_prompt_tokens: 16, max_response_tokens: 8}}
train: {{steps: 1, updates_per_rollout: 1, micro_batch_size: 2}}
tasks:
  train: [{{name: sums, kind: jsonl, path: {folder}/policy/sums.jsonl}}]
  eval: [{{name: sums, kind: jsonl, path: {folder}/policy/held_out.jsonl}}]
eval: {{every: 0, prompts: 2}}
algorithm: {{max_mismatch: 0.01}}
checkpoint: {{every: 0, export_hf: false}}
logging: {{tensorboard: false}}
"""


def one_step(subject: Subject) -> Line:
    """With the engine that is part of the trainer."""
    return _train("one-step train", ["rollout.engine=embedded"], subject, TRAIN_S)


def one_sync(subject: Subject) -> Line:
    """With a server: skipped where there is none to start."""
    what = "sync to a server"
    if subject.server_python is None:
        return Line(what, "note", "skipped: no interpreter with SGLang is named", "--server-python PYTHON")
    options = ["rollout.engine=sglang", f"rollout.sglang.python={subject.server_python}"]
    if torch.cuda.device_count() == 1:
        options += ["rollout.sglang.colocated=true", "rollout.sglang.extra_args=[--mem-fraction-static,'0.3']"]
    return _train(what, options, subject, SYNC_S)


def _train(what: str, options: list[str], subject: Subject, limit_s: float) -> Line:
    from megatron_dppo.launch.doctor.trial_policy import write_trial_policy  # transformers takes seconds to import

    with tempfile.TemporaryDirectory(prefix="megatron_dppo_doctor_") as scratch:
        folder = Path(scratch)
        write_trial_policy(folder / "policy")
        (folder / "trial.yaml").write_text(_CONFIG.format(folder=folder), encoding="utf-8")
        device = f"run.device={subject.recipe.run.device}"
        layers = f"model.backend={subject.recipe.model.backend}"
        arguments = ["train", "--config", str(folder / "trial.yaml"), device, layers, *options]
        began = time.monotonic()
        code, output = _run([sys.executable, "-m", "megatron_dppo", *arguments], limit_s - 2 * _ENDING_S)
        took = time.monotonic() - began
    if code == 0:
        return Line(what, "ok", f"{took:.0f} s, from nothing to the end")
    if code is None:
        return Line(
            what, "error", f"not done after {took:.0f} s", "see what the host is busy with; --quick leaves it out"
        )
    said = [line for line in output.splitlines() if line.strip()] or ["it said nothing"]
    told = next((line for line in reversed(said) if "error" in line.lower()), said[-1])
    return Line(
        what, "error", f"exit code {code}: {told.strip()[:500]}", "look for the message in docs/troubleshooting.md"
    )


def _run(command: list[str], limit_s: float) -> tuple[int | None, str]:
    """Exit code, None after ``limit_s``, and all that was printed. Nothing of its group is left."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit_s)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            process.terminate()  # its servers end with it
            try:
                output, _ = process.communicate(timeout=_ENDING_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
            return None, output
