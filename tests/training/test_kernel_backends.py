"""The kernels are interchangeable: training with any that is available here goes the same way."""

from __future__ import annotations

import pytest

from megatron_dppo.ops.backend import backend_report
from tests.training.tiny_runs import train, write_tiny_policy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

AVAILABLE = sorted(name for name, state in backend_report().items() if state == "available")
SMALL = (
    "warm_start.steps=0",
    "train.steps=4",
    "train.updates_per_rollout=1",
    "rollout.prompts_per_step=16",
    "eval.prompts=8",
    "eval.every=0",
)


def test_every_available_backend_gives_the_same_training_curve(tmp_path):
    if AVAILABLE == ["torch"]:
        pytest.skip(f"only plain torch is available here: {backend_report()}")
    policy = write_tiny_policy(tmp_path / "policy")
    runs = {
        name: train(policy, tmp_path, name, *SMALL, f"train.kernel_backend={name}", "checkpoint.every=0")
        for name in AVAILABLE
    }
    reference = runs.pop("torch")
    assert [record["step"] for record in reference] == [0, 1, 2, 3, 4]
    for name, records in runs.items():
        assert {record["backend"] for record in records[1:]} == {name}
        # The first batch was sampled by the same weights, so it is the same.
        first, expected = records[1], reference[1]
        for metric in ("reward/mean", "reward/std", "rollout/length_mean"):
            assert first[metric] == expected[metric], metric
        # A mean of entropies of the same sign, each of some ten roundings of 2^-24.
        assert first["entropy"] == pytest.approx(expected["entropy"], rel=10 * 2.0**-24)
        # Off by no more than the gradients are, as between layouts (GRADIENT_TOLERANCE, tests/layouts/test_parity_matrix.py).
        assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        # From there on Adam moves weights whose gradient is 0 but for rounding by its sign, and a few tokens are drawn
        # otherwise. Were the batches independent, rewards (at most 1, spread over 128 samples) would differ by 5 standard
        # errors of a difference once in a million.
        for record, expected in zip(records[2:], reference[2:], strict=True):
            error = 5 * (2 * expected["reward/std"] ** 2 / 128) ** 0.5
            assert record["reward/mean"] == pytest.approx(expected["reward/mean"], abs=error)
