"""The planner of batches: what it says of the recipe for 64 and 512 GPUs, and what it says of bad input."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from tests.models.published_configs import QWEN3_30B_A3B

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "conf" / "qwen3_30b_a3b.yaml"


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path):
    """``plan(arguments)`` -> (exit code, output, errors)"""
    (tmp_path / "config.json").write_text(
        json.dumps({**QWEN3_30B_A3B, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6})
    )
    main = runpy.run_path(str(ROOT / "tools" / "plan_batches.py"))["main"]

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["plan_batches.py", str(RECIPE), f"model.path={tmp_path}", *arguments])
        code = main()
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "least", "without_at_most"),
    [
        (("--world-size", "64"), 0.95, 0.8),
        (("--world-size", "512"), 0.90, 0.5),
        (
            (
                "--world-size",
                "256",
                "rollout.max_response_tokens=32768",
                "train.tokens_per_micro_batch=69632",
                "rollout.prompts_per_step=256",
            ),
            0.90,
            0.7,
        ),
    ],
    ids=["16 replicas", "128 replicas", "64 replicas of 32k"],
)
def test_replicas_hardly_wait_for_each_other(plan, arguments, least, without_at_most):
    code, output, errors = plan(*arguments, "--steps", "1")
    assert code == 0, errors
    worst, local = re.search(r"worst ([\d.]+); without exchange ([\d.]+)", output).groups()
    assert float(worst) >= least
    assert float(local) <= without_at_most


def test_lengths_of_a_run_can_be_taken(plan, tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"tokens": 100}\n{"tokens": 100}\n')
    code, output, _ = plan("--world-size", "64", "--run", str(tmp_path), "--steps", "1")
    assert code == 0
    assert str(512 * 250) in output  # each with a prompt of 150


def test_a_layout_that_does_not_fit_is_one_line(plan):
    code, output, errors = plan("--world-size", "6")
    assert (code, output) == (2, "")
    assert errors.startswith("error: the parallel layout")
