"""Products with an output layer's weight that are the same bits in every layout (``deterministic="layout"``).

A library decides by the shape of a product how it adds up, so that a row of it can depend on how many others there are. Here
every product has one of three shapes, whatever a call has: [R, h] x [h, 128] for the logits, [R, 128] x [128, h] for the
hidden states' gradient, [128, R] x [R, h] for the weight's; R tokens in their order, 128 columns of one tile of the
vocabulary, zeros where there are fewer of either. Operands are copied into buffers first, so that they are aligned alike.

The gradient of a hidden state is a sum over the vocabulary: tiles are added along the tree of ``ops/tile_tree.py``, ranks
exchange its nodes, and each of them has the whole sum. The gradient of a row of the weight is a sum over tokens: blocks of R
are added in order, from 0, and the sum goes where it belongs at once.

What is left to the library is that one product of one shape is always the same, on one kind of device with one number of
threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_dppo.ops.fp32_product import add_product, fp32_product
from megatron_dppo.ops.shard_merge import all_gather_rows
from megatron_dppo.ops.tile_tree import TILE_COLUMNS, TileTree, root_sum, tree_sum

BLOCK_ROWS = 128  # R


def fill_logits(logits_rV: torch.Tensor, hidden_rh: torch.Tensor, weight_Vh: torch.Tensor) -> None:
    """``logits = hidden @ weight.T`` of a block of at most R tokens; fp32 logits of 16-bit factors are not rounded."""
    block_Rh = _padded(hidden_rh, BLOCK_ROWS)
    product_Rt = logits_rV.new_empty(BLOCK_ROWS, TILE_COLUMNS)
    for columns, tile_th in _tiles(weight_Vh):
        if product_Rt.dtype == block_Rh.dtype:
            torch.mm(block_Rh, tile_th.t(), out=product_Rt)
        else:
            fp32_product(block_Rh, tile_th.t(), product_Rt)
        logits_rV[:, columns] = product_Rt[: logits_rV.shape[0], : columns.stop - columns.start]


def hidden_gradient(
    gradient_rV: torch.Tensor,
    weight_Vh: torch.Tensor,
    dtype: torch.dtype,
    tree: TileTree,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """[r, h] of ``dtype``: the gradient of a block of hidden states over the whole vocabulary, on every rank of ``group``."""

    def tiles() -> Iterator[torch.Tensor]:
        for columns, tile_th in _tiles(weight_Vh):
            yield _product(_padded(gradient_rV[:, columns], BLOCK_ROWS, TILE_COLUMNS), tile_th, dtype)

    nodes_MRh = tree_sum(tiles(), tree)
    nodes_TMRh = nodes_MRh[None]
    if tree.num_shards > 1:
        nodes_TMRh = nodes_MRh.new_empty(tree.num_shards, *nodes_MRh.shape)
        all_gather_rows(nodes_TMRh.flatten(0, 1), nodes_MRh, group)
    return root_sum(nodes_TMRh, tree)[: gradient_rV.shape[0]]


def add_weight_gradient(sums_Vh: torch.Tensor, gradient_rV: torch.Tensor, hidden_rh: torch.Tensor) -> None:
    """Add a block's part to the gradient of the weight, in the dtype of ``sums_Vh``: fp32, or fp64 for such factors."""
    block_Rh = _padded(hidden_rh, BLOCK_ROWS)
    for start in range(0, sums_Vh.shape[0], TILE_COLUMNS):
        columns = slice(start, min(start + TILE_COLUMNS, sums_Vh.shape[0]))
        transposed_tR = _padded(gradient_rV[:, columns].t(), TILE_COLUMNS, BLOCK_ROWS)
        sums_Vh[columns] += _product(transposed_tR, block_Rh, sums_Vh.dtype)[: columns.stop - start]


def complete_gradient(grad: torch.Tensor, caller_sums: bool, group: dist.ProcessGroup | None) -> torch.Tensor:
    """What a rank returns of a gradient that is whole on each: it, or, where the caller sums over ranks, 0 on all but one."""
    if caller_sums and group is not None and dist.get_rank(group) > 0:
        return torch.zeros_like(grad)
    return grad


def _tiles(weight_Vh: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(columns of the shard, [128, h] their rows of the weight), in one buffer after the other."""
    buffer_th = weight_Vh.new_empty(TILE_COLUMNS, weight_Vh.shape[1])
    for start in range(0, weight_Vh.shape[0], TILE_COLUMNS):
        columns = slice(start, min(start + TILE_COLUMNS, weight_Vh.shape[0]))
        buffer_th[: columns.stop - start] = weight_Vh[columns].detach()
        buffer_th[columns.stop - start :] = 0.0
        yield columns, buffer_th


def _product(a_mk: torch.Tensor, b_kn: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[m, n] ``a @ b``, a tensor of its own; 16-bit factors are added up in fp32."""
    if a_mk.dtype == b_kn.dtype == dtype:
        return a_mk @ b_kn
    sums_mn = b_kn.new_zeros(a_mk.shape[0], b_kn.shape[1], dtype=dtype)
    add_product(sums_mn, a_mk, b_kn)
    return sums_mn


def _padded(values: torch.Tensor, rows: int, columns: int | None = None) -> torch.Tensor:
    """A contiguous copy with zeros up to [rows, columns]."""
    padded = values.new_zeros(rows, values.shape[1] if columns is None else columns)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded
