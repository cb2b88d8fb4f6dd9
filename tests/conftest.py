"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch

import tests.hypothesis_profiles  # noqa: F401  loads one
from tests.rank_pool import RankPools

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """``ranks(n).run(function, *args)``: run a module-level function on n gloo ranks (see tests/rank_pool.py).

    All tests share the processes: importing Megatron-core on each rank takes longer than most of them.
    """
    pools = RankPools()
    yield pools
    pools.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        choices=["cpu", "cuda"],
        help="where tests make their tensors: cuda runs tests/ops and tests/loss there (tools/gpu_check.sh)",
    )


@pytest.fixture(autouse=True)
def _on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    device = request.config.getoption("--device")
    if device == "cpu":
        yield
        return
    # Seeded generators as well: torch refuses one of another device than the tensor's.
    monkeypatch.setattr(torch, "Generator", partial(torch.Generator, device=device))
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
