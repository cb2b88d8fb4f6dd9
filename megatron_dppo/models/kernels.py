"""Whose layers and which fused kernels a policy is built with: one decision, from what was asked for and what is there.

``local``: core's own layers, attention by torch. Runs anywhere. ``te``: Transformer Engine's layers, and with them
everything that stalls or is slow without:

* the rotary embedding of packed sequences in one kernel: core's own reads their bounds and loops over them, in every layer;
* permutation of tokens on their way to experts and back in one kernel each, and experts as one grouped product;
* weight gradients added to fp32 ``main_grad`` within the matrix product (``accumulate_in_main_grad``), not rounded to 16 bits
  in between.

Neither stands in for the other in silence: ``auto`` is ``te`` on a GPU and ``local`` elsewhere, whatever is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_dppo.compat.optional_dependencies import (
    Availability,
    probe_transformer_engine,
    probe_weight_gradient_fusion,
)
from megatron_dppo.errors import ConfigError

MODEL_BACKENDS = ("auto", "te", "local")


@dataclass(frozen=True)
class Kernels:
    """What a policy is built with.

    Attributes:
        transformer_engine: layers are Transformer Engine's.
        on_cuda: core's own fused kernels, which are compiled for CUDA, are used.
        rope_fusion: the rotary embedding is one kernel, which reads the bounds of packed sequences on the device.
        permute_fusion: the permutation of an MoE layer's tokens is one kernel.
        core_weight_gradient_fusion: core's own linear layers add weight gradients to ``main_grad`` in the product (apex).
    """

    transformer_engine: bool = False
    on_cuda: bool = False
    rope_fusion: bool = False
    permute_fusion: bool = False
    core_weight_gradient_fusion: bool = False


def choose_kernels(
    backend: str, device_type: str, engine: Availability | None = None, weight_gradient: Availability | None = None
) -> Kernels:
    """What ``backend`` means on such a device.

    Args:
        backend: auto | te | local.
        device_type: cuda, cpu; or meta, where only shapes are asked for and layers are core's whatever ``backend`` says.
        engine: whether Transformer Engine can be used. None: look.
        weight_gradient: whether apex's kernel for weight gradients can be used. None: look.

    Raises:
        ConfigError: Transformer Engine is asked for and cannot be used.
    """
    if backend not in MODEL_BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(MODEL_BACKENDS)}, not {backend!r}")
    if device_type == "meta":
        return Kernels()
    if backend == "te" or (backend == "auto" and device_type == "cuda"):
        found = engine or probe_transformer_engine()
        if device_type != "cuda" or not found.usable:
            asked = "model.backend=te" if backend == "te" else "model.backend=auto, which is te on a GPU,"
            reason = found.reason if device_type == "cuda" else f"its kernels do not run on a {device_type}"
            raise ConfigError(
                f"{asked} needs Transformer Engine: {reason}. Install it (docs/gpu_switches.md), or set model.backend=local"
            )
        # Core asks for *apex's* kernel wherever gradient_accumulation_fusion is set, though Transformer Engine has its own.
        return Kernels(transformer_engine=True, on_cuda=True, rope_fusion=True, permute_fusion=True)
    on_cuda = device_type == "cuda"
    fused = on_cuda and (weight_gradient or probe_weight_gradient_fusion()).usable
    return Kernels(on_cuda=on_cuda, core_weight_gradient_fusion=fused)


def accumulate_in_main_grad(model_chunks: Sequence[torch.nn.Module]) -> int:
    """Let Transformer Engine's modules add weight gradients to ``main_grad`` in the matrix product; returns how many do.

    To be called once DistributedDataParallel has given every parameter its fp32 ``main_grad``. Core would set this from
    ``gradient_accumulation_fusion``, which it refuses without apex for the sake of its own output layer; that layer is
    applied by ``PolicyHead`` here, and stays as it is.
    """
    modules = [m for chunk in model_chunks for m in chunk.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    for module in modules:
        without = [name for name, weight in module.named_parameters(recurse=False) if not hasattr(weight, "main_grad")]
        if without:
            raise ValueError(f"{type(module).__name__}: {', '.join(without)} have no main_grad to accumulate into")
        module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
    return len(modules)
