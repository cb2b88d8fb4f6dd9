"""The redirections: applied once, never with CUDA, and each does what it says."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dppo.compat.megatron_on_cpu import enable_megatron_on_cpu
from tests.rank_pool import RankPools

_WITH_CUDA = """
import torch
torch.cuda.is_available = lambda: True  # the only way to see this branch on a machine without CUDA
from megatron_dppo.compat.megatron_on_cpu import enable_megatron_on_cpu
before = {name: getattr(torch.cuda, name) for name in ("current_device", "Stream", "manual_seed")}, torch.empty
assert enable_megatron_on_cpu() is False
assert before == ({name: getattr(torch.cuda, name) for name in before[0]}, torch.empty)
"""


def test_nothing_is_redirected_where_cuda_is_available() -> None:
    done = subprocess.run([sys.executable, "-c", _WITH_CUDA], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the redirections are for machines without CUDA")
def test_enabling_twice_redirects_once() -> None:
    assert enable_megatron_on_cpu() is True
    once = torch.empty, torch.cuda.current_device, torch.Tensor.type
    assert enable_megatron_on_cpu() is True
    assert once == (torch.empty, torch.cuda.current_device, torch.Tensor.type)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the redirections are for machines without CUDA")
def test_cuda_requests_are_answered_with_the_cpu() -> None:
    enable_megatron_on_cpu()
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1], device="cuda", pin_memory=True).device.type == "cpu"
    assert torch.ones(1).cuda().device.type == "cpu"
    assert torch.empty(2, device="meta").device.type == "meta", "other devices are left alone"
    assert torch.ones(1).type() == "torch.FloatTensor", "only core's optimizer hears of CUDA types"


_DEVICE_CONTEXT = """
from megatron_dppo.compat.megatron_on_cpu import enable_megatron_on_cpu
enable_megatron_on_cpu()
import torch
with torch.device("meta"):
    assert torch.empty(2).device.type == "meta"
    assert torch.zeros(2, device="cuda").device.type == "cpu"
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the redirections are for machines without CUDA")
def test_the_default_device_context_goes_on_working() -> None:
    """In a fresh process: the context remembers the tensor factories at its first use."""
    done = subprocess.run(
        [sys.executable, "-c", _DEVICE_CONTEXT], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the redirections are for machines without CUDA")
def test_core_random_streams_are_independent_and_restored() -> None:
    enable_megatron_on_cpu()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("a", 11)
    tracker.add("b", 12)
    first = torch.rand(3)
    with tracker.fork("a"):
        from_a = torch.rand(3)
    second = torch.rand(3)
    with tracker.fork("a"):
        assert not torch.equal(torch.rand(3), from_a), "a stream goes on where it was"
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), from_a)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3), second), "forking leaves the default stream alone"


def _uneven(rank_rows: list[int]) -> tuple[Any, Any]:
    enable_megatron_on_cpu()
    from megatron.core.tensor_parallel import mappings

    rank, group = dist.get_rank(), dist.group.WORLD
    mine = torch.full((rank_rows[rank], 2), float(rank + 1))
    gathered = mappings._gather_along_first_dim(mine, group, rank_rows)
    scattered = mappings._reduce_scatter_along_first_dim(gathered * (rank + 1), group, rank_rows)
    return gathered, scattered


def test_uneven_shards_are_gathered_and_reduced(ranks: RankPools) -> None:
    results = ranks(2).run(_uneven, [1, 3])
    whole = torch.tensor([[1.0, 1.0], [2.0, 2.0], [2.0, 2.0], [2.0, 2.0]])
    for (gathered, scattered), expected in zip(results, (whole[:1] * 3, whole[1:] * 3), strict=True):
        assert torch.equal(gathered, whole)
        assert torch.equal(scattered, expected)
