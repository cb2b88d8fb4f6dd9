"""An output layer whose logits and gradients are the same bits in every layout: those of the fused way with
``deterministic="layout"`` (``ops/layout_products.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_dppo.ops.arguments import VocabShard
from megatron_dppo.ops.fp32_product import gradient_factor, is_16_bit
from megatron_dppo.ops.layout_products import (
    BLOCK_ROWS,
    add_weight_gradient,
    complete_gradient,
    fill_logits,
    hidden_gradient,
)
from megatron_dppo.ops.main_grad import mark_as_added
from megatron_dppo.ops.tile_tree import TileTree
from megatron_dppo.ops.torch_backend import compute_dtype


def layout_linear(
    hidden_nh: torch.Tensor,
    weight_Vh: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    accumulate_into_main_grad: bool = False,
    fp32_logits: bool = False,
) -> torch.Tensor:
    """[n, V/TP] ``hidden @ weight.T``, with gradient to both.

    Args:
        hidden_nh: [n, h] bf16, fp16, fp32 or fp64, the same on all ranks of ``tp_group``.
        weight_Vh: [V/TP, h] of the same dtype; V/TP is a multiple of 128 where there is more than one rank.
        tp_group: process group of the shards; None: the weight is whole.
        reduce_hidden_grad: every rank gets the gradient of ``hidden_nh`` over the whole vocabulary. False: the caller sums
            over ``tp_group``, whose first rank gets it, and the others 0.
        accumulate_into_main_grad: as for ``fused_linear_policy_stats``.
        fp32_logits: 16-bit factors: leave the logits in fp32 instead of rounding them to 16 bits.

    Raises:
        ValueError: shards do not begin where tiles of the vocabulary do.
    """
    width = weight_Vh.shape[0]
    tree = TileTree.of(VocabShard.locate(width, None, tp_group), width)
    dtype = torch.float32 if fp32_logits and is_16_bit(hidden_nh) else hidden_nh.dtype
    in_place = (accumulate_into_main_grad, not reduce_hidden_grad)
    logits: torch.Tensor = _LayoutLinearFunction.apply(hidden_nh, weight_Vh, tree, tp_group, dtype, *in_place)
    return logits


class _LayoutLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nh: torch.Tensor,
        weight_Vh: torch.Tensor,
        tree: TileTree,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        accumulate_into_main_grad: bool,
        caller_sums: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_nh, weight_Vh)
        ctx.tree, ctx.group = tree, group
        ctx.accumulate_into_main_grad, ctx.caller_sums = accumulate_into_main_grad, caller_sums
        logits_nV = hidden_nh.new_empty(hidden_nh.shape[0], weight_Vh.shape[0], dtype=dtype)
        for block in _blocks(hidden_nh.shape[0]):
            fill_logits(logits_nV[block], hidden_nh[block], weight_Vh)
        return logits_nV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nV: torch.Tensor) -> Any:
        hidden_nh, weight_Vh = ctx.saved_tensors
        exact = compute_dtype(hidden_nh)
        grad_hidden_nh, sums_Vh, grad_weight_Vh = None, None, None
        if ctx.needs_input_grad[0]:
            grad_hidden_nh = torch.empty_like(hidden_nh)
        if ctx.needs_input_grad[1]:
            sums_Vh = torch.zeros_like(weight_Vh, dtype=exact)
        for block in _blocks(hidden_nh.shape[0]):
            gradient_rV = grad_nV[block]
            if gradient_rV.dtype != weight_Vh.dtype:
                gradient_rV = gradient_factor(gradient_rV, weight_Vh.dtype)
            if grad_hidden_nh is not None:
                grad_hidden_nh[block] = hidden_gradient(gradient_rV, weight_Vh, exact, ctx.tree, ctx.group)
            if sums_Vh is not None:
                add_weight_gradient(sums_Vh, gradient_rV, hidden_nh[block])
        if grad_hidden_nh is not None:
            grad_hidden_nh = complete_gradient(grad_hidden_nh, ctx.caller_sums, ctx.group)
        if sums_Vh is not None and ctx.accumulate_into_main_grad:
            weight_Vh.main_grad += sums_Vh
            grad_weight_Vh = mark_as_added(weight_Vh)
        elif sums_Vh is not None:
            grad_weight_Vh = sums_Vh.to(weight_Vh.dtype)
        return grad_hidden_nh, grad_weight_Vh, *(None,) * 5


def _blocks(num_rows: int) -> list[slice]:
    return [slice(start, min(start + BLOCK_ROWS, num_rows)) for start in range(0, num_rows, BLOCK_ROWS)]
