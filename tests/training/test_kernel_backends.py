"""The kernels are interchangeable: training with any that is available here goes the same way."""

from __future__ import annotations

import pytest

from megatron_dppo.ops.backend import backend_report
from tests.training.tiny_runs import train, write_tiny_policy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

AVAILABLE = sorted(name for name, state in backend_report().items() if state == "available")
SMALL = ("warm_start.steps=0", "train.steps=4", "rollout.prompts_per_step=16", "eval.prompts=8", "eval.every=0")


def test_every_available_backend_gives_the_same_training_curve(tmp_path):
    if AVAILABLE == ["torch"]:
        pytest.skip(f"only plain torch is available here: {backend_report()}")
    policy = write_tiny_policy(tmp_path / "policy")
    runs = {
        name: train(policy, tmp_path, name, *SMALL, f"train.kernel_backend={name}", "checkpoint.every=0")
        for name in AVAILABLE
    }
    reference = runs.pop("torch")
    for name, records in runs.items():
        assert {record["backend"] for record in records[1:]} == {name}
        # The first batch was sampled by the same weights, so it is the same; its metrics are sums over some 1000 tokens in
        # fp32, and those of the later updates of its step see weights that Adam moved by the sign of rounding here and there.
        for metric in ("reward/mean", "entropy", "dppo/divergence_mean"):
            assert records[1][metric] == pytest.approx(reference[1][metric], rel=1e-2), metric
        # From there on a few tokens are drawn otherwise. Were the batches independent, rewards (at most 1, spread over 128
        # samples) would differ by 5 standard errors of a difference once in a million.
        for record, expected in zip(records[2:], reference[2:], strict=True):
            error = 5 * (2 * expected["reward/std"] ** 2 / 128) ** 0.5
            assert record["reward/mean"] == pytest.approx(expected["reward/mean"], abs=error)
            assert record["entropy"] == pytest.approx(expected["entropy"], rel=2e-2)
