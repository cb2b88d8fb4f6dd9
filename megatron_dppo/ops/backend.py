"""Which implementation reads a shard's logits: the interface that all of them have, and the choice.

``ops/torch_backend.py`` defines what the functions mean; ``ops/native_backend.py`` has the compiled ones.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any, Literal, Protocol

import torch

from megatron_dppo.errors import BackendUnavailableError
from megatron_dppo.ops import torch_backend
from megatron_dppo.ops.arguments import KnownColumns, Normaliser, RowSelection, RowState, TokenIds, VocabShard
from megatron_dppo.ops.shard_merge import MergedRows
from megatron_dppo.ops.tile_tree import TileTree

BACKENDS = ("auto", "cuda", "cpu", "torch")


class Reduction(Protocol):
    """From the logits of shards to a policy's statistics and their gradient. Nothing in it waits for the device."""

    def shard_partials(
        self, logits_NV: torch.Tensor, ids: TokenIds, selection: RowSelection, shard: VocabShard, temperature: float
    ) -> torch.Tensor:
        """Forward: one read of a shard gives the 5 + K numbers per row that the shards exchange."""
        ...

    def merge_shards(self, partials_RnC: torch.Tensor, mask_n: torch.Tensor | None) -> MergedRows:
        """What the shards found, combined."""
        ...

    def shard_gradient(
        self,
        logits_NV: torch.Tensor,
        grad_NV: torch.Tensor,
        target_N: torch.Tensor,
        mask_N: torch.Tensor | None,
        state: RowState,
        grad_log_prob_N: torch.Tensor | None,
        grad_entropy_N: torch.Tensor | None,
        shard: VocabShard,
        temperature: float,
    ) -> None:
        """Backward: one read and one write of a shard; ``grad_NV`` may be ``logits_NV`` itself."""
        ...


class Backend(Reduction, Protocol):
    """What reads and writes logits. Nothing in it waits for the device."""

    @property
    def name(self) -> str:
        """``cuda``, ``cpu`` (compiled kernels) or ``torch``."""
        ...

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What logits it takes."""
        ...

    @property
    def operators(self) -> Any | None:
        """Its compiled operators, a namespace of ``torch.ops``; None: it is plain torch."""
        ...

    def tile_nodes(
        self,
        logits_NV: torch.Tensor,
        ids: TokenIds,
        selection: RowSelection,
        shard: VocabShard,
        tree: TileTree,
        temperature: float,
    ) -> torch.Tensor:
        """``shard_partials`` in an order that no layout changes: 4 nodes + 1 + K numbers per row."""
        ...

    def merge_tile_nodes(
        self, partials_RnC: torch.Tensor, mask_n: torch.Tensor | None, tree: TileTree, temperature: float
    ) -> MergedRows:
        """``merge_shards`` of what ``tile_nodes`` found."""
        ...

    def shard_divergence(
        self,
        kind: Literal["tv", "kl"],
        policy_NV: torch.Tensor,
        policy: Normaliser,
        rollout_NV: torch.Tensor,
        rollout: Normaliser,
        selection: RowSelection,
        known: KnownColumns | None,
        shard: VocabShard,
        temperature: float,
    ) -> torch.Tensor:
        """This shard's share of D(mu || pi): one read of two policies' logits."""
        ...


def choose_backend(name: str, logits: torch.Tensor) -> Backend:
    """Return the implementation of ``name`` for ``logits``, which may be anything of their device and dtype.

    ``auto`` takes the compiled kernels where they can be used, else plain torch. Naming a backend is a demand: there is
    no silent fallback.

    Raises:
        BackendUnavailableError: the name is unknown, or that backend cannot be used for these logits.
    """
    if name not in BACKENDS and name not in _OTHERS:
        raise BackendUnavailableError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    backend, reason = (_OTHERS[name], None) if name in _OTHERS else _compiled_backend(name, logits.device)
    if backend is not None and logits.dtype in backend.dtypes:
        return backend
    if name == "auto":
        return torch_backend
    reason = reason or f"the kernels do not take {logits.dtype}"
    raise BackendUnavailableError(f"backend {name!r} cannot be used: {reason}. Use 'torch' or 'auto'")


_OTHERS: dict[str, Backend] = {"torch": torch_backend}  # than the compiled kernels of the logits' device


def add_backend(backend: Backend) -> None:
    """Let ``choose_backend`` find a backend that is not this package's, by its name; ``auto`` never takes it."""
    if backend.name in BACKENDS:
        raise ValueError(f"{backend.name!r} is the name of one of this package's backends")
    _OTHERS[backend.name] = backend


def backend_report() -> dict[str, str]:
    """Every backend and whether it can be used here: ``"available"``, or the reason why not."""
    report = {"torch": "available"}
    for device in ("cpu", "cuda"):
        if _NATIVE is None:
            report[device] = str(_WHY_NOT_NATIVE)
        elif device not in _NATIVE.DEVICES:
            report[device] = f"megatron_dppo._C was built without kernels for {device}"
        elif device == "cuda" and not torch.cuda.is_available():
            report[device] = "compiled in, but torch sees no CUDA device"
        else:
            report[device] = "available"
    return report


def native_operators(device: torch.device) -> Any | None:
    """``torch.ops.megatron_dppo`` where it is built and has kernels for the device; else None."""
    return None if _NATIVE is None or device.type not in _NATIVE.DEVICES else _NATIVE.operators


def cpu_kernel_level() -> str:
    """The level of x86-64 that the compiled CPU kernels use on this processor, such as ``"x86-64-v3"``.

    Empty without compiled kernels, and for those of other processors.
    """
    return _NATIVE.CPU_LEVEL if _NATIVE is not None else ""


def _import_native_module() -> tuple[ModuleType | None, str | None]:
    """ops/native_backend.py, or why it cannot be used."""
    try:
        return importlib.import_module("megatron_dppo.ops.native_backend"), None
    except ModuleNotFoundError:
        return None, "the extension megatron_dppo._C is not built (pip install --no-build-isolation . builds it)"
    except ImportError as error:
        # Built, but for another torch, interpreter or version of this package: falling back in silence would cost a
        # factor of many.
        reason = f"the extension megatron_dppo._C does not load ({error})"
        warnings.warn(f"{reason}; the slower plain-torch kernels are used", RuntimeWarning, stacklevel=2)
        return None, reason


# At import: torch.compile cannot look into one.
_NATIVE, _WHY_NOT_NATIVE = _import_native_module()


def _compiled_backend(name: str, device: torch.device) -> tuple[Backend | None, str | None]:
    """The compiled kernels for a device, or why they cannot be used; ``name`` is that of the backend asked for."""
    if _NATIVE is None:
        return None, _WHY_NOT_NATIVE
    if name not in ("auto", device.type):
        return None, f"the logits are on {device}"
    if device.type not in _NATIVE.DEVICES:
        return None, f"megatron_dppo._C was built without kernels for {device.type}"
    return _NATIVE.NativeBackend(device.type), None
