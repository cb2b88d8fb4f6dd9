"""An output layer whose 16-bit hidden states and weight make fp32 logits.

Forward: one product that is not rounded (``ops/fp32_product.py``). Backward: the logits' gradient is used in chunks of
columns, so that a copy of it, where one is needed, is a small part of it. Every chunk finishes the gradient of its rows of
the weight, and adds to that of the hidden states in fp32. Each of the two is rounded once, at the end, to its own dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_dppo.ops.fp32_product import add_product, fp32_product, gradient_factor
from megatron_dppo.ops.main_grad import mark_as_added

# Fewer would need more memory for a chunk's copy, more would add to the hidden states' gradient more often.
_CHUNKS = 8


def fp32_linear(
    hidden_nh: torch.Tensor, weight_Vh: torch.Tensor, *, accumulate_into_main_grad: bool = False
) -> torch.Tensor:
    """[n, V] fp32: ``hidden @ weight.T``, with gradient to both.

    Args:
        hidden_nh: [n, h] bf16 or fp16.
        weight_Vh: [V, h] of the same dtype.
        accumulate_into_main_grad: add the weight's gradient to ``weight.main_grad`` in place and tell Megatron's
            DistributedDataParallel so; autograd then sees a gradient of 0.
    """
    logits: torch.Tensor = _Fp32LinearFunction.apply(hidden_nh, weight_Vh, accumulate_into_main_grad)
    return logits


class _Fp32LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_nh: torch.Tensor, weight_Vh: torch.Tensor, accumulate_into_main_grad: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_nh, weight_Vh)
        ctx.accumulate_into_main_grad = accumulate_into_main_grad
        logits_nV = hidden_nh.new_empty(hidden_nh.shape[0], weight_Vh.shape[0], dtype=torch.float32)
        return fp32_product(hidden_nh, weight_Vh.t(), logits_nV)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nV: torch.Tensor) -> Any:
        hidden_nh, weight_Vh = ctx.saved_tensors
        in_place = ctx.accumulate_into_main_grad
        hidden_sums_nh, grad_weight_Vh = None, None
        if ctx.needs_input_grad[0]:
            hidden_sums_nh = torch.zeros_like(hidden_nh, dtype=torch.float32)
        if ctx.needs_input_grad[1]:
            grad_weight_Vh = weight_Vh.main_grad if in_place else torch.zeros_like(weight_Vh)
        columns = max(1, math.ceil(weight_Vh.shape[0] / _CHUNKS))
        for start in range(0, weight_Vh.shape[0], columns):
            chunk = slice(start, start + columns)
            tile_nC = gradient_factor(grad_nV[:, chunk], weight_Vh.dtype)
            if hidden_sums_nh is not None:
                add_product(hidden_sums_nh, tile_nC, weight_Vh[chunk])
            if grad_weight_Vh is not None:
                add_product(grad_weight_Vh[chunk], tile_nC.t(), hidden_nh)
        if in_place and grad_weight_Vh is not None:
            grad_weight_Vh = mark_as_added(weight_Vh)
        return None if hidden_sums_nh is None else hidden_sums_nh.to(hidden_nh.dtype), grad_weight_Vh, None
