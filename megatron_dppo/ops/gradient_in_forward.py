"""A policy gradient from hidden states and the output layer's weight in three matrix products: it is made in forward.

``ops/fused_linear.py`` makes every tile of logits twice, because what multiplies a token's gradient is known after its whole
row was read. Where that is a number per token that the loss knows as soon as it has the token's statistics, and nothing else
carries gradient, a block of tokens over all of a rank's columns can be finished at once::

    logits -> statistics (one all-gather) -> d loss / d log_prob -> the logits' gradient, in place -> both products

What comes out is a 0 with that gradient; backward only multiplies it by the number it is called with.

**Collectives.** One all-gather for each block, so ranks must agree on the blocks. These follow from the number of tokens and
the width of a shard, both the same on all ranks of the group, as everywhere in ``ops/``.

**Used once.** The gradient is handed out, not made, by backward. A second backward through the same call is an error.

**main_grad.** The weight's gradient is the size of the weight. It goes to ``main_grad`` as it is made, in forward, where the
caller promises what number backward will be called with (``backward_scale``); another number is then an error, found on the
device. A forward without a backward leaves ``main_grad`` changed, and so does one that activation recompute runs twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_dppo.ops.arguments import RowSelection, TokenIds
from megatron_dppo.ops.linear_call import LinearCall, linear_call
from megatron_dppo.ops.linear_tiles import (
    LinearPlan,
    add_hidden_gradient,
    add_weight_gradient,
    finish_hidden_gradient,
    logits_tile,
    selected_hidden,
    usable_gradient,
    weight_gradient_sums,
)
from megatron_dppo.ops.main_grad import mark_as_added
from megatron_dppo.ops.policy_stats import PolicyStats
from megatron_dppo.ops.shard_merge import gather_shards
from megatron_dppo.ops.torch_backend import compute_dtype

# (statistics [r] of a block, its place among the selected tokens) -> [r] d loss / d log_prob. With deterministic="layout" and
# a mask a block's tokens need not be neighbours: their places are then [r] int64.
TokenGradient = Callable[[PolicyStats, slice | torch.Tensor], torch.Tensor]


def zero_with_policy_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    token_gradient: TokenGradient,
    *,
    block_rows: int,
    backward_scale: float | None = None,
    **arguments: Any,
) -> torch.Tensor:
    """Scalar 0 whose gradient to ``hidden`` and ``weight`` is that of ``(token_gradient * log_prob).sum()``.

    Args:
        hidden: [..., h] as for ``fused_linear_policy_stats``.
        weight: [V/TP, h].
        target: [...] int64; [n] with ``rows``.
        token_gradient: called once for every block, in order, with the statistics of its tokens, without gradient;
            [r] or [r, K]. It returns [r]. 0 for a token outside the mask.
        block_rows: tokens of a block (``rows_of_a_block``); not asked with ``deterministic="layout"``.
        backward_scale: the number that backward will be called with. Needed with ``accumulate_into_main_grad``.
        arguments: all others of ``fused_linear_policy_stats``.

    Raises:
        ValueError: as there; or ``accumulate_into_main_grad`` without ``backward_scale``.
        RuntimeError: backward was called twice, or with another number than ``backward_scale``.
    """
    call = linear_call(hidden, weight, target, **arguments)
    if call.plan.accumulate_into_main_grad and backward_scale is None:
        raise ValueError(
            "accumulate_into_main_grad=True needs backward_scale: the gradient is added in forward, so the number that "
            "backward will be called with must be known"
        )
    n = call.ids.target.shape[0]
    if call.plan.tree is not None:
        block_rows = call.plan.tiling.rows
    blocks = [slice(start, min(start + block_rows, n)) for start in range(0, n, block_rows)]
    zero: torch.Tensor = _GradientInForward.apply(hidden, weight, call, blocks, token_gradient, backward_scale)
    return zero


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: Any,  # a parameter, with what Megatron puts on it
        call: LinearCall,
        blocks: list[slice],
        token_gradient: TokenGradient,
        backward_scale: float | None,
    ) -> torch.Tensor:
        plan = call.plan
        hidden_nh = selected_hidden(hidden, call.selection, plan)
        grad_hidden_nh = torch.empty_like(hidden_nh) if ctx.needs_input_grad[0] else None
        grad_weight_Vh = None
        if ctx.needs_input_grad[1]:
            grad_weight_Vh = weight.main_grad if plan.accumulate_into_main_grad else torch.zeros_like(weight)
        sums_Vh = grad_weight_Vh
        if grad_weight_Vh is not None and plan.tree is not None:
            sums_Vh = weight_gradient_sums(grad_weight_Vh, len(blocks), compute_dtype(hidden_nh), plan)
        most_rows = blocks[0].stop if blocks else 0
        buffer = hidden_nh.new_empty(most_rows * weight.shape[0], dtype=plan.tile_dtype)
        for block in blocks:
            tile_rV = logits_tile(buffer, hidden_nh[block], weight, plan)
            _overwrite_with_gradient(tile_rV, block, call, token_gradient, backward_scale)
            gradient_rV = usable_gradient(tile_rV, plan, weight.dtype)
            if grad_hidden_nh is not None:
                _product(gradient_rV, weight, grad_hidden_nh[block], plan)
            if sums_Vh is not None:
                add_weight_gradient(sums_Vh, gradient_rV, hidden_nh[block], plan)
        if grad_weight_Vh is not None and sums_Vh is not None and sums_Vh is not grad_weight_Vh:
            grad_weight_Vh += sums_Vh
        saved = None if plan.accumulate_into_main_grad else grad_weight_Vh
        ctx.save_for_backward(weight, grad_hidden_nh, saved, call.selection.rows)
        ctx.plan, ctx.hidden_shape, ctx.scale, ctx.used = plan, hidden.shape, backward_scale, False
        return hidden_nh.new_zeros((), dtype=compute_dtype(hidden_nh))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> Any:
        if ctx.used:
            raise RuntimeError(
                "backward a second time through a gradient that was made in forward, and has been handed out: call the loss "
                "again, or use fused_linear_policy_stats, which makes it anew each time"
            )
        ctx.used = True
        weight, grad_hidden_nh, grad_weight_Vh, rows = ctx.saved_tensors
        if ctx.scale is not None:
            torch._assert_async(
                scale == ctx.scale,
                f"backward was called with another number than the promised backward_scale={ctx.scale}: what was added to "
                "the main_grad of the weight is wrong",
            )
        grad_hidden = None
        if grad_hidden_nh is not None:
            scaled_nh = grad_hidden_nh if ctx.scale is not None else grad_hidden_nh.mul_(scale)
            grad_hidden = finish_hidden_gradient(scaled_nh, rows, ctx.hidden_shape, ctx.plan)
        grad_weight = grad_weight_Vh
        if ctx.plan.accumulate_into_main_grad and ctx.needs_input_grad[1]:
            grad_weight = mark_as_added(weight)
        elif grad_weight_Vh is not None and ctx.scale is None:
            grad_weight = grad_weight_Vh.mul_(scale)
        return grad_hidden, grad_weight, *(None,) * 4


def _overwrite_with_gradient(
    tile_rV: torch.Tensor, block: slice, call: LinearCall, token_gradient: TokenGradient, scale: float | None
) -> None:
    """A block's logits -> the gradient of the loss to them."""
    plan, mask = call.plan, call.selection.mask
    target_r, mask_r = call.ids.target[block], None if mask is None else mask[block]
    ids = TokenIds(target_r, None if call.ids.topk is None else call.ids.topk[block])
    partials_rC = plan.reduction.shard_partials(tile_rV, ids, RowSelection(mask=mask_r), plan.shard, plan.temperature)
    merged = plan.reduction.merge_shards(gather_shards(partials_rC, plan.shard.group), mask_r)
    topk = None if ids.topk is None else merged.topk_log_prob
    places = block if call.order is None else call.order[block]
    gradient_r = token_gradient(PolicyStats(merged.log_prob, merged.entropy, merged.collision, topk), places)
    if scale is not None and scale != 1.0:
        gradient_r = gradient_r * scale
    plan.reduction.shard_gradient(
        tile_rV, tile_rV, target_r, mask_r, merged.state, gradient_r, None, plan.shard, plan.temperature
    )


def _product(gradient_rV: torch.Tensor, weight_Vh: torch.Tensor, out_rh: torch.Tensor, plan: LinearPlan) -> None:
    """``out = gradient @ weight``, rounded once."""
    if gradient_rV.dtype == weight_Vh.dtype and plan.tree is None:
        torch.mm(gradient_rV, weight_Vh, out=out_rh)
        return
    sums_rh = torch.zeros_like(out_rh, dtype=compute_dtype(out_rh))
    add_hidden_gradient(sums_rh, gradient_rV, weight_Vh, plan)
    out_rh.copy_(sums_rh)
