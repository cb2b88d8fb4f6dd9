"""Choosing a backend: auto always works, a named one is used or is an error that says why."""

from __future__ import annotations

import importlib.util
import platform
import runpy
import subprocess
import sys

import pytest
import torch

from megatron_dppo.errors import BackendUnavailableError
from megatron_dppo.ops import torch_backend
from megatron_dppo.ops.backend import backend_report, choose_backend, cpu_kernel_level

BUILT = importlib.util.find_spec("megatron_dppo._C") is not None


def _logits() -> torch.Tensor:
    return torch.zeros(2, 3)


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(BackendUnavailableError, match="must be one of auto, cuda, cpu, torch, not 'triton'"):
        choose_backend("triton", _logits())


def test_a_backend_for_another_device_is_an_error() -> None:
    device = _logits().device.type
    other = "cpu" if device == "cuda" else "cuda"
    with pytest.raises(BackendUnavailableError, match=rf"'{other}' cannot be used: .*(on {device}|_C)"):
        choose_backend(other, _logits())


def test_what_the_kernels_cannot_do_goes_to_torch_only_if_nobody_insisted() -> None:
    assert choose_backend("auto", _logits().double()) is torch_backend
    assert choose_backend("torch", _logits().double()) is torch_backend
    with pytest.raises(BackendUnavailableError, match="float64" if BUILT else "not built"):
        choose_backend(_logits().device.type, _logits().double())


def test_importing_the_package_needs_torch_alone() -> None:
    """Neither Megatron nor the heavy parts of the stack may be imported with the public names."""
    code = (
        "import sys; from megatron_dppo import *; print('torch' in sys.modules, "
        "[m for m in ('megatron', 'transformers', 'sglang') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert answer.stdout.strip() == "True []"


def test_the_report_names_the_level_of_the_cpu_kernels() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "megatron_dppo.ops"], capture_output=True, text=True, timeout=120, check=True
    )
    level = f" ({cpu_kernel_level()})" if cpu_kernel_level() else ""
    assert f"cpu    {backend_report()['cpu']}{level}" in answer.stdout.splitlines()
    assert bool(level) == (BUILT and platform.machine() == "x86_64")


def test_kernels_of_a_level_that_this_processor_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    native = pytest.importorskip("megatron_dppo.ops.native_backend", reason="the extension is not built")
    monkeypatch.setattr(native._C, "cpu_level", "x86-64-v4")
    monkeypatch.setattr(native._C, "cpu_level_is_supported", False)
    message = "for x86-64-v4 only, which this processor lacks: build it again without MEGATRON_DPPO_CPU_LEVEL"
    with pytest.raises(ImportError, match=message):
        runpy.run_path(native.__file__)
