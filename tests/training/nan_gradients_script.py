"""The example script with losses that are NaN from the second training step on: what test_killed_runs.py runs."""

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


def loss_of(self, *arguments):
    made = _loss_of(self, *arguments)
    return made._replace(loss=made.loss * float("nan")) if steps > 1 else made


DPPOStep.run, DPPOStep._loss_of = run, loss_of
runpy.run_path(str(Path(__file__).with_name("quick_run_script.py")), run_name="__main__")
