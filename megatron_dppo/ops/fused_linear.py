"""Policy statistics from hidden states and the output layer's weight: the logits never exist as a whole.

With a vocabulary of 150,000 a token's logits are far larger than all else that is kept of it. Here a tile of at most
``chunk_bytes`` of them exists at a time: some columns of the vocabulary, for as many of the tokens as fit.

Forward: every tile is made by one matrix product and reduced to ``5 + K`` numbers per token. The column chunks of a rank
merge exactly as the shards of ranks do (``ops/shard_merge.py``), so all of them go into the one all-gather. Backward:
every tile is made again, overwritten with its gradient and used in two products. Column by column, because

* a chunk of the weight's gradient is then finished at once. Accumulating it over chunks of tokens would need a buffer of
  the weight's size in fp32, or lose digits in bf16; only the [n, h] gradient of the hidden states has to be accumulated;
* the weight, the largest tensor here, is read once by each product. Chunks of tokens would read all of it for each chunk.

With ``fp32_logits`` a tile is fp32 where hidden states and weight are 16-bit, and so are all sums (``ops/fp32_product.py``).

It costs one matrix product more than the logits that it replaces, four instead of three. With ``rows`` only the selected
tokens enter the products; a mask, whose length nobody on the host knows, saves the reductions but not the products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_dppo.ops.arguments import (
    RowSelection,
    RowState,
    TokenIds,
    VocabShard,
    as_matrix,
    check_ids,
    check_temperature,
    select,
)
from megatron_dppo.ops.backend import Backend, choose_backend
from megatron_dppo.ops.fp32_product import add_product, fp32_product, gradient_factor, is_16_bit
from megatron_dppo.ops.main_grad import mark_as_added
from megatron_dppo.ops.policy_stats import PolicyStats, shaped_stats
from megatron_dppo.ops.shard_merge import STATE_COLUMNS, all_gather_rows, gather_shards
from megatron_dppo.ops.torch_backend import compute_dtype

CHUNK_BYTES = 64 * 2**20
# A tile this wide adds to the hidden states' gradient about as many bytes as it has itself; narrower ones would add more.
_MIN_COLUMNS = 4096
_ALIGNMENT = 128  # columns; matrix products are slower on odd sizes


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
        checks: now: an id outside the vocabulary is an error here, for which this call waits for the device. off: ids are
            the caller's promise, and nothing is waited for.

    Returns:
        PolicyStats. log_prob and entropy carry gradient to ``hidden`` and ``weight``.

    Raises:
        ValueError: shapes, dtypes or the shard's place do not fit; a target or top-K id lies outside [0, vocab_size).
        BackendUnavailableError: the backend asked for cannot be used.
    """
    world_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    _check_linear(hidden, weight, sequence_parallel, tp_group, reduce_hidden_grad, chunk_bytes)
    if accumulate_into_main_grad and not hasattr(weight, "main_grad"):
        raise ValueError(
            "accumulate_into_main_grad=True, but the weight has no main_grad: wrap the model in Megatron's "
            "DistributedDataParallel first, and pass the parameter itself"
        )
    shape = hidden.shape[:-1]
    if sequence_parallel:
        shape = torch.Size((shape[0] * world_size, *shape[1:]))
    selection, ids, result_shape = select("hidden", hidden, shape, target, topk_ids, token_mask, rows)
    check_temperature(temperature)
    shard = VocabShard.locate(weight.shape[0], vocab_size, tp_group)
    if checks == "now":
        check_ids(ids, selection, result_shape, shard.vocab_size)
    tile_dtype = torch.float32 if fp32_logits and is_16_bit(hidden) else hidden.dtype
    plan = _Plan(
        shard=shard,
        world_size=world_size,
        temperature=float(temperature),
        tiling=_Tiling.within(chunk_bytes, ids.target.shape[0], weight.shape[0], tile_dtype),
        tile_dtype=tile_dtype,
        backend=choose_backend(backend, hidden),
        sequence_parallel=sequence_parallel and world_size > 1,
        reduce_hidden_grad=reduce_hidden_grad and world_size > 1,
        accumulate_into_main_grad=accumulate_into_main_grad,
    )
    results = _FusedLinearFunction.apply(hidden, weight, *ids, *selection, plan)
    return shaped_stats(results, result_shape, has_topk=topk_ids is not None)


@dataclass(frozen=True)
class _Tiling:
    """How [n, V/TP] is cut. Columns come first: see the module's docstring."""

    num_rows: int
    width: int
    rows: int
    columns: int

    @classmethod
    def within(cls, chunk_bytes: int, num_rows: int, width: int, dtype: torch.dtype) -> _Tiling:
        elements = max(1, chunk_bytes // dtype.itemsize)
        rows = min(max(1, num_rows), max(1, elements // min(width, _MIN_COLUMNS)))
        columns = max(1, min(width, elements // rows))
        # Chunks of about equal width, for a narrow last one would be slow; aligned without growing beyond the limit.
        alignment = _ALIGNMENT if columns >= _ALIGNMENT else 1
        columns = columns // alignment * alignment if columns < width else width
        chunks = math.ceil(width / columns)
        columns = min(columns, math.ceil(width / chunks / alignment) * alignment)
        return cls(num_rows, width, rows, columns)

    def column_chunks(self) -> list[slice]:
        return [slice(c, min(c + self.columns, self.width)) for c in range(0, self.width, self.columns)]

    def row_blocks(self) -> list[slice]:
        return [slice(r, min(r + self.rows, self.num_rows)) for r in range(0, self.num_rows, self.rows)]


@dataclass(frozen=True)
class _Plan:
    """What forward and backward agree on."""

    shard: VocabShard
    world_size: int
    temperature: float
    tiling: _Tiling
    tile_dtype: torch.dtype
    backend: Backend
    sequence_parallel: bool
    reduce_hidden_grad: bool
    accumulate_into_main_grad: bool


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
        plan: _Plan,
    ) -> tuple[torch.Tensor, ...]:
        whole = _gather_sequence(hidden, plan) if plan.sequence_parallel else hidden
        # Kept for backward: the selected tokens only, already gathered.
        hidden_nh = RowSelection(rows, mask).take(as_matrix(whole))
        if mask is not None:
            # What is outside may be anything; times a gradient of 0 it would be NaN in the weight's gradient.
            hidden_nh = hidden_nh.masked_fill(~mask[:, None], 0.0)
        partials_cnC = _chunk_partials(hidden_nh, weight, TokenIds(target_n, topk_ids_nK), mask, plan)
        chunks, n, _ = partials_cnC.shape
        gathered = gather_shards(partials_cnC.flatten(0, 1), plan.shard.group)
        merged = plan.backend.merge_shards(gathered.unflatten(1, (chunks, n)).flatten(0, 1), mask)

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
        plan: _Plan = ctx.plan
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
            grad_hidden = _finish_hidden_gradient(grad_hidden_nh.to(hidden_nh.dtype), rows, ctx.hidden_shape, plan)
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
    hidden_nh: torch.Tensor, weight: torch.Tensor, ids: TokenIds, mask: torch.Tensor | None, plan: _Plan
) -> torch.Tensor:
    """[chunks, n, 5 + K]: what each column chunk says about each token (``ops/torch_backend.py``)."""
    chunks = plan.tiling.column_chunks()
    columns = STATE_COLUMNS + 1 + (0 if ids.topk is None else ids.topk.shape[1])
    partials = hidden_nh.new_empty(len(chunks), hidden_nh.shape[0], columns, dtype=compute_dtype(hidden_nh))
    buffer = _tile_buffer(hidden_nh, plan)
    for index, chunk in enumerate(chunks):
        for block in plan.tiling.row_blocks():
            tile = _logits_tile(buffer, hidden_nh[block], weight[chunk])
            partials[index, block] = plan.backend.shard_partials(
                tile,
                TokenIds(ids.target[block], None if ids.topk is None else ids.topk[block]),
                RowSelection(mask=None if mask is None else mask[block]),
                plan.shard.part(chunk),
                plan.temperature,
            )
    return partials


def _gradient_tiles(
    hidden_nh: torch.Tensor, weight_Ch: torch.Tensor, chunk: slice, tokens: _Tokens, plan: _Plan
) -> Iterator[tuple[slice, torch.Tensor]]:
    """For each block of tokens: (block, gradient of its logits in this chunk). All of them are in one buffer, in turn."""
    buffer = _tile_buffer(hidden_nh, plan)
    for block in plan.tiling.row_blocks():
        tile = _logits_tile(buffer, hidden_nh[block], weight_Ch)
        plan.backend.shard_gradient(tile, tile, *tokens.part(block), plan.shard.part(chunk), plan.temperature)
        yield block, tile


def _use_gradient_tiles(
    tiles: Iterator[tuple[slice, torch.Tensor]],
    hidden_nh: torch.Tensor,
    weight_Ch: torch.Tensor,
    grad_hidden_nh: torch.Tensor | None,
    weight_sums_Ch: torch.Tensor | None,
    plan: _Plan,
) -> None:
    """Add one column chunk's part to the gradient of the hidden states, and its rows to the gradient of the weight."""
    sums_Ch, exact = weight_sums_Ch, compute_dtype(hidden_nh)
    # More than one sum, in a dtype that would lose digits each time: sum in fp32 first.
    if sums_Ch is not None and sums_Ch.dtype != exact and len(plan.tiling.row_blocks()) > 1:
        sums_Ch = torch.zeros_like(sums_Ch, dtype=exact)
    for block, gradient in tiles:
        tile = gradient if plan.tile_dtype == hidden_nh.dtype else gradient_factor(gradient, hidden_nh.dtype)
        if grad_hidden_nh is not None:
            _add_product(grad_hidden_nh[block], tile, weight_Ch, plan)
        if sums_Ch is not None:
            _add_product(sums_Ch, tile.t(), hidden_nh[block], plan)
    if weight_sums_Ch is not None and sums_Ch is not None and sums_Ch is not weight_sums_Ch:
        weight_sums_Ch.add_(sums_Ch)


def _tile_buffer(hidden_nh: torch.Tensor, plan: _Plan) -> torch.Tensor:
    return hidden_nh.new_empty(min(plan.tiling.rows, hidden_nh.shape[0]) * plan.tiling.columns, dtype=plan.tile_dtype)


def _logits_tile(buffer: torch.Tensor, hidden_rh: torch.Tensor, weight_Ch: torch.Tensor) -> torch.Tensor:
    """[r, C] logits, in the buffer: a tensor of its own would live at the same time as the tile before it."""
    tile = buffer[: hidden_rh.shape[0] * weight_Ch.shape[0]].view(hidden_rh.shape[0], weight_Ch.shape[0])
    if buffer.dtype == hidden_rh.dtype:
        return torch.mm(hidden_rh, weight_Ch.t(), out=tile)
    return fp32_product(hidden_rh, weight_Ch.t(), tile)


def _add_product(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor, plan: _Plan) -> None:
    """``sums += a @ b``; without fp32 logits the product may have a lower precision than the sums."""
    if plan.tile_dtype != b.dtype:
        add_product(sums, a, b)
    elif sums.dtype == a.dtype:
        sums.addmm_(a, b)
    else:
        sums.add_(a @ b)


def _gather_sequence(hidden: torch.Tensor, plan: _Plan) -> torch.Tensor:
    """[s/TP, ..., h] -> [s, ..., h]."""
    whole = hidden.new_empty(hidden.shape[0] * plan.world_size, *hidden.shape[1:])
    all_gather_rows(whole, hidden.contiguous(), plan.shard.group)
    return whole


def _finish_hidden_gradient(
    grad_nh: torch.Tensor, rows: torch.Tensor | None, hidden_shape: torch.Size, plan: _Plan
) -> torch.Tensor:
    """Sum over ranks, put the tokens back into their places; each rank keeps its part of the sequence."""
    if plan.reduce_hidden_grad and not plan.sequence_parallel:
        dist.all_reduce(grad_nh, group=plan.shard.group)
    places = math.prod(hidden_shape[:-1]) * (plan.world_size if plan.sequence_parallel else 1)
    grad_Nh = RowSelection(rows).spread(grad_nh, places)
    if not plan.sequence_parallel:
        return grad_Nh.view(hidden_shape)
    grad_local = grad_Nh.new_empty(hidden_shape)
    dist.reduce_scatter_tensor(grad_local, grad_Nh.view(-1, *hidden_shape[1:]), group=plan.shard.group)
    return grad_local


def _check_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None,
    reduce_hidden_grad: bool,
    chunk_bytes: int,
) -> None:
    if weight.dim() != 2 or hidden.dim() < 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [..., h] and [V/TP, h] with one h"
        )
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"hidden is {hidden.dtype} on {hidden.device}, weight {weight.dtype} on {weight.device}: they must agree"
        )
    if sequence_parallel and tp_group is None:
        raise ValueError("sequence_parallel=True needs tp_group, over which hidden is split")
    if sequence_parallel and not reduce_hidden_grad:
        raise ValueError(
            "reduce_hidden_grad=False cannot go with sequence_parallel=True, which sums while it scatters: gather the "
            "hidden states before, or leave the reduction on"
        )
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, not {chunk_bytes}")
