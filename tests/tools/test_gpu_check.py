"""tools/gpu_check.sh without a GPU says so, with an exit code of its own; its path through the benchmarks runs anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_dppo.ops.backend import backend_report

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_checked_and_nothing_is_installed(tmp_path: Path) -> None:
    result = subprocess.run([TOOLS / "gpu_check.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 3
    assert "no GPU: gpu_check needs an NVIDIA GPU with its driver, and nvcc" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_torch_without_cuda_is_no_gpu_either() -> None:
    result = subprocess.run(
        [sys.executable, TOOLS / "check" / "gpu_check.py"], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 3
    assert "sees no CUDA device" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(backend_report()["cpu"] != "available", reason=backend_report()["cpu"])
def test_benchmarks_end_up_in_one_table() -> None:
    command = [sys.executable, TOOLS / "check" / "gpu_check.py", "--device", "cpu", "--skip-tests"]
    # Without the compiler, which takes a minute for the fused cross entropy of Megatron-core, in every process anew.
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850)
    assert result.returncode == 0, result.stderr
    for line in (
        "backend cpu",
        "forward (row partials)",
        "backward (gradient)",
        "exact divergence",
        "hash of weights",
        "eager",
        "in forward, ",
        "two passes, ",
        "logits + eager, ",
        "two shards give what one gives",
    ):
        assert any(row.startswith(line) for row in result.stdout.splitlines()), line
    assert "FAILED" not in result.stdout
