"""What both ways through an output layer share (``fused_linear.py``, ``gradient_in_forward.py``): the arguments of a call,
tiles of logits, products with their gradients, and what the ranks exchange of hidden states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dppo.ops import layout_products
from megatron_dppo.ops.arguments import RowSelection, VocabShard, as_matrix
from megatron_dppo.ops.backend import Reduction
from megatron_dppo.ops.fp32_product import add_product, fp32_product, gradient_factor
from megatron_dppo.ops.shard_merge import STATE_COLUMNS, all_gather_rows
from megatron_dppo.ops.tile_tree import NODE_COLUMNS, TileTree

# A tile this wide adds to the hidden states' gradient about as many bytes as it has itself; narrower ones would add more.
_MIN_COLUMNS = 4096
_ALIGNMENT = 128  # columns; matrix products are slower on odd sizes


@dataclass(frozen=True)
class Tiling:
    """How [n, V/TP] is cut. Columns come first: see ``ops/fused_linear.py``."""

    num_rows: int
    width: int
    rows: int
    columns: int

    @classmethod
    def within(cls, chunk_bytes: int, num_rows: int, width: int, dtype: torch.dtype) -> Tiling:
        """Tiles of at most ``chunk_bytes``, or one logit."""
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
        """In order, without gaps."""
        return [slice(c, min(c + self.columns, self.width)) for c in range(0, self.width, self.columns)]

    def row_blocks(self) -> list[slice]:
        """In order, without gaps."""
        return [slice(r, min(r + self.rows, self.num_rows)) for r in range(0, self.num_rows, self.rows)]


@dataclass(frozen=True)
class LinearPlan:
    """What forward and backward agree on.

    Attributes:
        tile_dtype: of the logits.
        tree: with ``deterministic="layout"``, over which sums of the vocabulary are taken; else None.
    """

    shard: VocabShard
    world_size: int
    temperature: float
    tiling: Tiling
    tile_dtype: torch.dtype
    reduction: Reduction
    tree: TileTree | None
    sequence_parallel: bool
    reduce_hidden_grad: bool
    accumulate_into_main_grad: bool

    @property
    def partial_columns(self) -> int:
        """Numbers that a shard says about each token, without the top K."""
        return (STATE_COLUMNS if self.tree is None else NODE_COLUMNS * self.tree.nodes) + 1


def tile_buffer(hidden_nh: torch.Tensor, plan: LinearPlan) -> torch.Tensor:
    """Memory of the largest tile."""
    return hidden_nh.new_empty(min(plan.tiling.rows, hidden_nh.shape[0]) * plan.tiling.columns, dtype=plan.tile_dtype)


def logits_tile(
    buffer: torch.Tensor, hidden_rh: torch.Tensor, weight_Ch: torch.Tensor, plan: LinearPlan
) -> torch.Tensor:
    """[r, C] logits, in the buffer: a tensor of its own would live at the same time as the tile before it."""
    tile = buffer[: hidden_rh.shape[0] * weight_Ch.shape[0]].view(hidden_rh.shape[0], weight_Ch.shape[0])
    if plan.tree is not None:
        layout_products.fill_logits(tile, hidden_rh, weight_Ch)
        return tile
    if buffer.dtype == hidden_rh.dtype:
        return torch.mm(hidden_rh, weight_Ch.t(), out=tile)
    return fp32_product(hidden_rh, weight_Ch.t(), tile)


def usable_gradient(tile: torch.Tensor, plan: LinearPlan, dtype: torch.dtype) -> torch.Tensor:
    """A tile's gradient as ``add_gradient_product`` multiplies it with matrices of ``dtype``: itself, or a rounded copy."""
    return tile if plan.tile_dtype == dtype else gradient_factor(tile, dtype)


def add_hidden_gradient(
    sums_rh: torch.Tensor, tile_rC: torch.Tensor, weight_Ch: torch.Tensor, plan: LinearPlan
) -> None:
    """Add a tile's part to the gradient of its tokens' hidden states; the tile is what ``usable_gradient`` returned."""
    if plan.tree is None:
        add_gradient_product(sums_rh, tile_rC, weight_Ch)
    else:
        sums_rh += layout_products.hidden_gradient(tile_rC, weight_Ch, sums_rh.dtype, plan.tree, plan.shard.group)


def add_weight_gradient(
    sums_Ch: torch.Tensor, tile_rC: torch.Tensor, hidden_rh: torch.Tensor, plan: LinearPlan
) -> None:
    """Add a tile's part to the gradient of its columns' rows of the weight."""
    if plan.tree is None:
        add_gradient_product(sums_Ch, tile_rC.t(), hidden_rh)
    else:
        layout_products.add_weight_gradient(sums_Ch, tile_rC, hidden_rh)


def weight_gradient_sums(place_Ch: torch.Tensor, blocks: int, exact: torch.dtype, plan: LinearPlan) -> torch.Tensor:
    """Where the parts of so many blocks of tokens add up: ``place_Ch``, which is the gradient, or sums of their own.

    Of their own where the gradient's dtype would lose digits each time, and where what is there already must not come into
    the order of the sums.
    """
    if plan.tree is None and (place_Ch.dtype == exact or blocks == 1):
        return place_Ch
    return torch.zeros_like(place_Ch, dtype=exact)


def add_gradient_product(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``sums += a @ b``; 16-bit factors and fp32 sums: without a rounding in between."""
    if sums.dtype == a.dtype == b.dtype:
        sums.addmm_(a, b)
    else:
        add_product(sums, a, b)


def selected_hidden(hidden: torch.Tensor, selection: RowSelection, plan: LinearPlan) -> torch.Tensor:
    """[n, h] hidden states of the selected tokens, gathered over the sequence; 0 outside the mask."""
    whole = gather_sequence(hidden, plan) if plan.sequence_parallel else hidden
    hidden_nh = selection.take(as_matrix(whole))
    if selection.mask is None:
        return hidden_nh
    # What is outside may be anything; times a gradient of 0 it would be NaN in the weight's gradient.
    return hidden_nh.masked_fill(~selection.mask[:, None], 0.0)


def gather_sequence(hidden: torch.Tensor, plan: LinearPlan) -> torch.Tensor:
    """[s/TP, ..., h] -> [s, ..., h]."""
    whole = hidden.new_empty(hidden.shape[0] * plan.world_size, *hidden.shape[1:])
    all_gather_rows(whole, hidden.contiguous(), plan.shard.group)
    return whole


def finish_hidden_gradient(
    grad_nh: torch.Tensor, rows: torch.Tensor | None, hidden_shape: torch.Size, plan: LinearPlan
) -> torch.Tensor:
    """Sum over ranks, put the tokens back into their places; each rank keeps its part of the sequence.

    With ``deterministic="layout"`` the sum is there already, on every rank.
    """
    if plan.tree is not None:
        grad_nh = layout_products.complete_gradient(grad_nh, not plan.reduce_hidden_grad, plan.shard.group)
    elif plan.reduce_hidden_grad and not plan.sequence_parallel:
        dist.all_reduce(grad_nh, group=plan.shard.group)
    places = math.prod(hidden_shape[:-1]) * (plan.world_size if plan.sequence_parallel else 1)
    grad_Nh = RowSelection(rows).spread(grad_nh, places)
    if not plan.sequence_parallel:
        return grad_Nh.view(hidden_shape)
    if plan.tree is not None:
        return grad_Nh.view(-1, *hidden_shape[1:]).chunk(plan.world_size)[dist.get_rank(plan.shard.group)]
    grad_local = grad_Nh.new_empty(hidden_shape)
    dist.reduce_scatter_tensor(grad_local, grad_Nh.view(-1, *hidden_shape[1:]), group=plan.shard.group)
    return grad_local
