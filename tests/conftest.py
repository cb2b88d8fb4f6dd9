"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch

import tests.hypothesis_profiles  # noqa: F401  loads one
from megatron_dppo.compat.optional_dependencies import hide_unusable_dependencies
from megatron_dppo.ops.backend import backend_report
from tests.csrc import emulated_backend
from tests.rank_pool import RankPools

hide_unusable_dependencies()  # before a test imports megatron.core
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
        help="where tests make their tensors: with cuda, tests/ops and tests/loss run on backend cuda (tools/gpu_check.sh)",
    )


def backends_under_test(device: str) -> dict[str, str | None]:
    """The backends of a device, each with the reason why it cannot be used here, if any.

    The CUDA kernels are among them: themselves where the device is a GPU, else emulated (tests/csrc/emulated_backend.py).
    """
    report = backend_report()
    reasons = {name: None if report[name] == "available" else report[name] for name in ("torch", device)}
    if device == "cpu":
        reasons["emulated"] = reasons["cpu"] or emulated_backend.why_not()
    return reasons


BACKEND_ARGUMENTS = ("backend", "compiled_backend")  # of tests; the latter without plain torch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    with_values = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    for argument in BACKEND_ARGUMENTS:
        if argument not in metafunc.fixturenames or any(argument in names for names in with_values):
            continue
        parameters = []
        for name, reason in backends_under_test(metafunc.config.getoption("--device")).items():
            if name == "torch" and argument == "compiled_backend":
                continue
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            if name == "emulated" and metafunc.definition.get_closest_marker("emulated_nightly"):
                marks.append(pytest.mark.nightly)
            parameters.append(pytest.param(name, marks=marks))
        metafunc.parametrize(argument, parameters)


def pytest_runtest_setup(item: pytest.Item) -> None:
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if "emulated" in [given.get(argument) for argument in BACKEND_ARGUMENTS]:
        emulated_backend.load()


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
