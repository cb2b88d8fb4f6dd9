"""Adding a weight's gradient to the ``main_grad`` that Megatron's DistributedDataParallel keeps for it."""

from __future__ import annotations

import torch


def mark_as_added(weight: torch.Tensor) -> torch.Tensor | None:
    """Mark the gradient as added; returns what autograd is to see: zeros, which Megatron's hooks want for a gradient.

    Core returns an uninitialised tensor of the weight's size here. A zero tensor without storage costs nothing, and is
    right as well where the weight is tied and the embedding's gradient is added to it.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch._efficientzerotensor(weight.shape, dtype=weight.dtype, device=weight.device)
