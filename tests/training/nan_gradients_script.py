"""The example script with NaN hidden states, and so losses, from the second training step on: test_killed_runs.py runs it."""

from __future__ import annotations

import runpy
from pathlib import Path

from megatron_dppo.training.policy.dppo_step import DPPOStep

_run, _loss_of = DPPOStep.run, DPPOStep._loss_of
steps = 0


def run(self, batch, traced):
    global steps
    steps += 1
    return _run(self, batch, traced)


def loss_of(self, parts, batch, hidden, rollout_logits):
    return _loss_of(self, parts, batch, hidden * float("nan") if steps > 1 else hidden, rollout_logits)


DPPOStep.run, DPPOStep._loss_of = run, loss_of
runpy.run_path(str(Path(__file__).with_name("quick_run_script.py")), run_name="__main__")
