"""Which implementation reads a shard's logits.

A backend is a module with four functions: ``shard_partials`` (forward: one read of the logits), ``merge_shards`` (what
the shards found, combined), ``shard_gradient`` (backward: one read, one write) and ``shard_divergence`` (of two policies:
one read of both). ``ops/torch_backend.py`` defines what they mean; ``ops/native_backend.py`` has the compiled ones.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

import torch

from megatron_dppo.errors import BackendUnavailableError
from megatron_dppo.ops import torch_backend

BACKENDS = ("auto", "cuda", "cpu", "torch")


def choose_backend(name: str, logits: torch.Tensor) -> ModuleType:
    """Return the module that implements ``name`` for ``logits``.

    ``auto`` takes the compiled kernels where they can be used, else plain torch. Naming a backend is a demand: there is
    no silent fallback.

    Raises:
        BackendUnavailableError: the name is unknown, or that backend cannot be used for these logits.
    """
    if name not in BACKENDS:
        raise BackendUnavailableError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    if name == "torch":
        return torch_backend
    native, reason = _native_backend()
    if native is not None:
        reason = _why_not(native, logits)
    if name != "auto" and logits.device.type != name:
        reason = f"the logits are on {logits.device}"
    if native is not None and reason is None:
        return native
    if name == "auto":
        return torch_backend
    raise BackendUnavailableError(f"backend {name!r} cannot be used: {reason}. Use 'torch' or 'auto'")


def backend_in_use(name: str, logits: torch.Tensor) -> str:
    """Which of cuda, cpu and torch ``choose_backend`` takes. ``logits`` may be anything of their device and dtype."""
    return "torch" if choose_backend(name, logits) is torch_backend else logits.device.type


def backend_report() -> dict[str, str]:
    """Every backend and whether it can be used here: ``"available"``, or the reason why not."""
    native, reason = _native_backend()
    report = {"torch": "available"}
    for device in ("cpu", "cuda"):
        if native is None:
            report[device] = str(reason)
        elif device not in native.DEVICES:
            report[device] = f"megatron_dppo._C was built without kernels for {device}"
        elif device == "cuda" and not torch.cuda.is_available():
            report[device] = "compiled in, but torch sees no CUDA device"
        else:
            report[device] = "available"
    return report


@cache
def _native_backend() -> tuple[ModuleType | None, str | None]:
    """The compiled backend, or why there is none."""
    try:
        return importlib.import_module("megatron_dppo.ops.native_backend"), None
    except ModuleNotFoundError:
        return None, "the extension megatron_dppo._C is not built (pip install --no-build-isolation . builds it)"
    except ImportError as error:
        # Built, but for another torch or interpreter: falling back in silence would cost a factor of many.
        reason = f"the extension megatron_dppo._C does not load ({error})"
        warnings.warn(f"{reason}; the slower plain-torch kernels are used", RuntimeWarning, stacklevel=3)
        return None, reason


def _why_not(native: ModuleType, logits: torch.Tensor) -> str | None:
    if logits.device.type not in native.DEVICES:
        return f"megatron_dppo._C was built without kernels for {logits.device.type}"
    if logits.dtype not in native.DTYPES:
        return f"the kernels do not take {logits.dtype}"
    return None
