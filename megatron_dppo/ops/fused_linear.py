"""Policy statistics from hidden states and the output layer's weight: the logits never exist as a whole.

With a vocabulary of 150,000 a token's logits are far larger than all else that is kept of it. Here a tile of at most
``chunk_bytes`` of them exists at a time: some columns of the vocabulary, for as many of the tokens as fit.

Forward: every tile is made by one matrix product and reduced to ``5 + K`` numbers per token. The column chunks of a rank
merge exactly as the shards of ranks do (``ops/shard_merge.py``): into one shard's numbers before the one all-gather, or,
where there is nobody to gather from, with it. Backward:
every tile is made again, overwritten with its gradient and used in two products. Column by column, because

* a chunk of the weight's gradient is then finished at once. Accumulating it over chunks of tokens would need a buffer of
  the weight's size in fp32, or lose digits in bf16; only the [n, h] gradient of the hidden states has to be accumulated;
* the weight, the largest tensor here, is read once by each product. Chunks of tokens would read all of it for each chunk.

With ``fp32_logits`` a tile is fp32 where hidden states and weight are 16-bit, and so are all sums (``ops/fp32_product.py``).

It costs one matrix product more than the logits that it replaces, four instead of three. With ``rows`` only the selected
tokens enter the products; a mask, whose length nobody on the host knows, saves the reductions but not the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_dppo.ops.arguments import RowSelection, RowState, TokenIds
from megatron_dppo.ops.linear_call import CHUNK_BYTES, linear_call
from megatron_dppo.ops.linear_tiles import (
    LinearPlan,
    add_hidden_gradient,
    add_weight_gradient,
    finish_hidden_gradient,
    logits_tile,
    selected_hidden,
    tile_buffer,
    usable_gradient,
    weight_gradient_sums,
)
from megatron_dppo.ops.main_grad import mark_as_added
from megatron_dppo.ops.policy_stats import PolicyStats, shaped_stats
from megatron_dppo.ops.shard_merge import gather_shards, merge_chunks
from megatron_dppo.ops.tile_tree import Deterministic
from megatron_dppo.ops.torch_backend import compute_dtype


def fused_linear_policy_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    topk_ids: torch.Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    token_mask: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    sequence_parallel: bool = False,
    reduce_hidden_grad: bool = True,
    accumulate_into_main_grad: bool = False,
    fp32_logits: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
    deterministic: Deterministic = "off",
    checks: Literal["now", "off"] = "now",
) -> PolicyStats:
    """``vocab_parallel_policy_stats(hidden @ weight.T, ...)`` in the memory of one tile of those logits.

    Args:
        hidden: [..., h] bf16, fp16, fp32 or fp64, the same on all ranks of ``tp_group``; with ``sequence_parallel`` this
            rank's part [s/TP, ..., h] of [s, ..., h].
        weight: [V/TP, h] this rank's rows of the output layer, in the dtype of ``hidden``.
        target: [...] int64 global token ids, already shifted to align with ``hidden``; [s, ...] with
            ``sequence_parallel``. This and all that follows is the same on all ranks.
        topk_ids: [..., K] int64 global ids whose log-probs are wanted too.
        temperature: divides the logits.
        vocab_size: true size of the whole vocabulary; rows of the weight beyond it are padding and get gradient 0.
        tp_group: process group of the shards; None: the weight is whole.
        token_mask: [...] bool; results and gradients of the other tokens are 0.
        rows: [n] int64 distinct positions in the flattened tokens: nothing is computed for the others, all results are [n]
            and so is what belongs to a token above.
        sequence_parallel: all-gather ``hidden`` along its first dimension, reduce-scatter its gradient.
        reduce_hidden_grad: sum the gradient of ``hidden`` over ``tp_group``. False: each rank gets the part of its own
            columns, and something before sums them (``PolicyHead.response_hidden`` does).
        accumulate_into_main_grad: add the weight's gradient to ``weight.main_grad`` in place, which costs no buffer of the
            weight's size, and tell Megatron's DistributedDataParallel so (``weight.grad_added_to_main_grad``). The
            gradient that autograd sees is then 0.
        fp32_logits: 16-bit hidden states and weight: leave the logits in fp32 instead of rounding them to 16 bits. Otherwise
            it changes nothing.
        chunk_bytes: largest tile of logits.
        backend: auto | cuda | cpu | torch; it works on the tiles.
        deterministic: as for ``vocab_parallel_policy_stats``; with layout the gradients too are the same bits, and those of
            the way over logits that ``layout_linear`` makes. ``chunk_bytes`` is not asked then.
        checks: now: an id outside the vocabulary is an error here, for which this call waits for the device. off: ids are
            the caller's promise, and nothing is waited for.

    Returns:
        PolicyStats. log_prob and entropy carry gradient to ``hidden`` and ``weight``.

    Raises:
        ValueError: shapes, dtypes or the shard's place do not fit; a target or top-K id lies outside [0, vocab_size).
        BackendUnavailableError: the backend asked for cannot be used.
    """
    call = linear_call(
        hidden,
        weight,
        target,
        topk_ids=topk_ids,
        temperature=temperature,
        vocab_size=vocab_size,
        tp_group=tp_group,
        token_mask=token_mask,
        rows=rows,
        sequence_parallel=sequence_parallel,
        reduce_hidden_grad=reduce_hidden_grad,
        accumulate_into_main_grad=accumulate_into_main_grad,
        fp32_logits=fp32_logits,
        chunk_bytes=chunk_bytes,
        backend=backend,
        deterministic=deterministic,
        checks=checks,
    )
    results = _FusedLinearFunction.apply(hidden, weight, *call.ids, *call.selection, call.plan)
    in_place = tuple(call.in_place(values) for values in results)
    return shaped_stats(in_place, call.shape, has_topk=topk_ids is not None)


class _FusedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target_n: torch.Tensor,
        topk_ids_nK: torch.Tensor | None,
        rows: torch.Tensor | None,
        mask: torch.Tensor | None,
        plan: LinearPlan,
    ) -> tuple[torch.Tensor, ...]:
        # Kept for backward: the selected tokens only, already gathered.
        hidden_nh = selected_hidden(hidden, RowSelection(rows, mask), plan)
        partials_cnC = _chunk_partials(hidden_nh, weight, TokenIds(target_n, topk_ids_nK), mask, plan)
        if plan.world_size > 1:
            shard_nC = partials_cnC[0] if plan.tree is not None else merge_chunks(partials_cnC)
            partials_RnC = gather_shards(shard_nC, plan.shard.group)
        else:
            partials_RnC = partials_cnC
        merged = plan.reduction.merge_shards(partials_RnC, mask)

        ctx.save_for_backward(hidden_nh, weight, target_n, rows, mask, *merged.state)
        ctx.plan, ctx.hidden_shape = plan, hidden.shape
        ctx.mark_non_differentiable(merged.collision, merged.topk_log_prob)
        ctx.set_materialize_grads(False)
        return merged.log_prob, merged.entropy, merged.collision, merged.topk_log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any) -> Any:
        if grad_log_prob is None and grad_entropy is None:
            return (None,) * 7
        plan: LinearPlan = ctx.plan
        hidden_nh, weight, target_n, rows, mask, *state_n = ctx.saved_tensors
        tokens = _Tokens(target_n, mask, RowState(*state_n), grad_log_prob, grad_entropy)
        grad_hidden_nh, weight_sums_Vh = None, None
        if ctx.needs_input_grad[0]:
            grad_hidden_nh = torch.zeros_like(hidden_nh, dtype=compute_dtype(hidden_nh))
        if ctx.needs_input_grad[1]:
            weight_sums_Vh = weight.main_grad if plan.accumulate_into_main_grad else torch.zeros_like(weight)
        for chunk in plan.tiling.column_chunks():
            tiles = _gradient_tiles(hidden_nh, weight[chunk], chunk, tokens, plan)
            sums_Ch = None if weight_sums_Vh is None else weight_sums_Vh[chunk]
            _use_gradient_tiles(tiles, hidden_nh, weight[chunk], grad_hidden_nh, sums_Ch, plan)

        grad_hidden = None
        if grad_hidden_nh is not None:
            grad_hidden = finish_hidden_gradient(grad_hidden_nh.to(hidden_nh.dtype), rows, ctx.hidden_shape, plan)
        grad_weight = weight_sums_Vh
        if weight_sums_Vh is not None and plan.accumulate_into_main_grad:
            grad_weight = mark_as_added(weight)
        return grad_hidden, grad_weight, *(None,) * 5


class _Tokens(NamedTuple):
    """What a backward knows of every token."""

    target: torch.Tensor
    mask: torch.Tensor | None
    state: RowState
    grad_log_prob: torch.Tensor | None
    grad_entropy: torch.Tensor | None

    def part(self, block: slice) -> _Tokens:
        return _Tokens(
            self.target[block],
            None if self.mask is None else self.mask[block],
            RowState(*(values[block] for values in self.state)),
            None if self.grad_log_prob is None else self.grad_log_prob[block],
            None if self.grad_entropy is None else self.grad_entropy[block],
        )


def _chunk_partials(
    hidden_nh: torch.Tensor, weight: torch.Tensor, ids: TokenIds, mask: torch.Tensor | None, plan: LinearPlan
) -> torch.Tensor:
    """[chunks, n, 5 + K]: what each column chunk says about each token (``ops/torch_backend.py``)."""
    chunks = plan.tiling.column_chunks()
    columns = plan.partial_columns + (0 if ids.topk is None else ids.topk.shape[1])
    partials = hidden_nh.new_empty(len(chunks), hidden_nh.shape[0], columns, dtype=compute_dtype(hidden_nh))
    buffer = tile_buffer(hidden_nh, plan)
    for index, chunk in enumerate(chunks):
        for block in plan.tiling.row_blocks():
            tile = logits_tile(buffer, hidden_nh[block], weight[chunk], plan)
            partials[index, block] = plan.reduction.shard_partials(
                tile,
                TokenIds(ids.target[block], None if ids.topk is None else ids.topk[block]),
                RowSelection(mask=None if mask is None else mask[block]),
                plan.shard.part(chunk),
                plan.temperature,
            )
    return partials


def _gradient_tiles(
    hidden_nh: torch.Tensor, weight_Ch: torch.Tensor, chunk: slice, tokens: _Tokens, plan: LinearPlan
) -> Iterator[tuple[slice, torch.Tensor]]:
    """For each block of tokens: (block, gradient of its logits in this chunk). All of them are in one buffer, in turn."""
    buffer = tile_buffer(hidden_nh, plan)
    for block in plan.tiling.row_blocks():
        tile = logits_tile(buffer, hidden_nh[block], weight_Ch, plan)
        plan.reduction.shard_gradient(tile, tile, *tokens.part(block), plan.shard.part(chunk), plan.temperature)
        yield block, tile


def _use_gradient_tiles(
    tiles: Iterator[tuple[slice, torch.Tensor]],
    hidden_nh: torch.Tensor,
    weight_Ch: torch.Tensor,
    grad_hidden_nh: torch.Tensor | None,
    weight_sums_Ch: torch.Tensor | None,
    plan: LinearPlan,
) -> None:
    """Add one column chunk's part to the gradient of the hidden states, and its rows to the gradient of the weight."""
    sums_Ch = weight_sums_Ch
    if sums_Ch is not None:
        blocks = len(plan.tiling.row_blocks())
        sums_Ch = weight_gradient_sums(sums_Ch, blocks, compute_dtype(hidden_nh), plan)
    for block, gradient in tiles:
        tile = usable_gradient(gradient, plan, hidden_nh.dtype)
        if grad_hidden_nh is not None:
            add_hidden_gradient(grad_hidden_nh[block], tile, weight_Ch, plan)
        if sums_Ch is not None:
            add_weight_gradient(sums_Ch, tile, hidden_nh[block], plan)
    if weight_sums_Ch is not None and sums_Ch is not None and sums_Ch is not weight_sums_Ch:
        weight_sums_Ch.add_(sums_Ch)
