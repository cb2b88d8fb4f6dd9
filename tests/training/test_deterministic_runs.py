"""``train.deterministic=layout`` reaches the output layer and the loss: which way they go changes no bit of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_runs import train, write_tiny_policy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = (
    "warm_start.steps=0",
    "train.steps=2",
    "rollout.prompts_per_step=16",
    "eval.prompts=8",
    "eval.every=0",
    "checkpoint.every=0",
)
OF_THE_UPDATE = ("grad_norm", "reward/mean")  # the loss is a sum over tokens, which blocks of them add up otherwise


def of_the_updates(records: list[dict[str, Any]]) -> list[list[float]]:
    return [[record[name] for name in OF_THE_UPDATE] for record in records[1:]]


def test_fused_and_not_fused_are_one_run(tmp_path: Path) -> None:
    policy = write_tiny_policy(tmp_path / "policy")

    def run(fused: str, deterministic: str) -> list[list[float]]:
        options = (f"train.fused_linear={fused}", f"train.deterministic={deterministic}")
        return of_the_updates(train(policy, tmp_path, f"{fused}_{deterministic}", *SMALL, *options))

    expected = run("false", "layout")
    assert len(expected) == 2
    assert all(grad_norm > 0 for grad_norm, _ in expected)
    assert run("true", "layout") == expected
    # The usual way has other roundings, or this would show nothing.
    assert run("true", "off") != expected
