"""The example script; from samples to weights, nothing may be pickled for other ranks, once all is set up."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch.distributed.distributed_c10d as c10d

from megatron_dppo.training.policy.dppo_step import DPPOStep
from megatron_dppo.training.trainer import Trainer

_generate, _run, _to_tensor = Trainer.generate_and_score, DPPOStep.run, c10d._object_to_tensor
forbidden, steps = False, 0


def generate_and_score(self):
    global forbidden, steps
    steps += 1
    forbidden = steps > 1  # an engine may agree on who holds which layers when it first generates
    return _generate(self)


def run(self, batch, traced):
    global forbidden
    metrics = _run(self, batch, traced)
    forbidden = False
    return metrics


def to_tensor(value, *arguments, **options):
    if forbidden:
        raise AssertionError(f"pickled for another rank on the way from samples to weights: {type(value).__name__}")
    return _to_tensor(value, *arguments, **options)


Trainer.generate_and_score, DPPOStep.run, c10d._object_to_tensor = generate_and_score, run, to_tensor
runpy.run_path(str(Path(__file__).with_name("quick_run_script.py")), run_name="__main__")
