"""--device, and the backends that follow: tests of ops/ and loss/ run on the CUDA kernels, emulated where there is no GPU."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_dppo.ops.backend import backend_report, choose_backend
from tests.conftest import backends_under_test
from tests.csrc import emulated_backend

TESTS = Path(__file__).parent
MODULES = sorted(path for folder in ("ops", "loss") for path in (TESTS / folder).glob("*.py"))


class _Tensors(TorchFunctionMode):
    """Counts the tensors that functions return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.is_tensor(result):
            self.found.append(func.__name__)
        return result


@pytest.mark.parametrize("module", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_importing_tests_makes_no_tensors(module: Path) -> None:
    """They would be on the CPU: the device under test is chosen before each test, after all are imported."""
    with _Tensors() as tensors:
        runpy.run_path(str(module))
    assert tensors.found == []


def test_a_tensor_made_at_import_would_be_found(tmp_path: Path) -> None:
    module = tmp_path / "test_with_a_constant.py"
    module.write_text("import torch\nMASK = [torch.tensor([True, False])]\n")
    with _Tensors() as tensors:
        runpy.run_path(str(module))
    assert tensors.found == ["tensor"]


def test_the_backends_are_those_of_the_device() -> None:
    assert list(backends_under_test("cuda")) == ["torch", "cuda"]
    assert list(backends_under_test("cpu")) == ["torch", "cpu", "emulated"]
    reasons = backends_under_test("cpu")
    assert reasons["torch"] is None
    assert (reasons["cpu"] is None) == (backend_report()["cpu"] == "available")


def test_the_emulated_kernels_are_there_where_they_can_be_compiled(compiled_backend: str) -> None:
    """A backend that a test asks for by name is the one that it gets, with operators of its own."""
    backend = choose_backend(compiled_backend, torch.zeros(1))
    assert backend.name == compiled_backend
    namespace = emulated_backend.NAMESPACE if compiled_backend == "emulated" else "megatron_dppo"
    assert backend.operators is getattr(torch.ops, namespace)
