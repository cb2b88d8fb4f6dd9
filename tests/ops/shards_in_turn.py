"""Statistics and gradients of a vocabulary in shards, computed by one process one after the other: no ranks are needed."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dppo.ops.arguments import RowSelection, TokenIds, VocabShard
from megatron_dppo.ops.backend import Backend
from megatron_dppo.ops.layout_reduction import LayoutReduction
from megatron_dppo.ops.tile_tree import TILE_COLUMNS, TileTree, node_runs


def padded_width(vocab: int, num_shards: int) -> int:
    """Columns of a shard where Megatron pads the vocabulary for so many of them."""
    whole = TILE_COLUMNS * num_shards
    return -(-vocab // whole) * whole // num_shards


def reductions(
    backend: Backend, vocab: int, num_shards: int, temperature: float
) -> list[tuple[VocabShard, LayoutReduction]]:
    width = padded_width(vocab, num_shards)
    tiles = width // TILE_COLUMNS
    nodes = max(len(list(node_runs(r * tiles, (r + 1) * tiles))) for r in range(num_shards))
    return [
        (
            VocabShard(None, vocab, r * width, max(0, min(width, vocab - r * width))),
            LayoutReduction(backend, TileTree(r * tiles, tiles, num_shards, nodes), temperature),
        )
        for r in range(num_shards)
    ]


def layout_results(
    backend: Backend,
    logits_NV: torch.Tensor,
    ids: TokenIds,
    num_shards: int,
    *,
    selection: RowSelection | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
    offset: int = 0,
) -> list[torch.Tensor]:
    """[log_prob, entropy, collision, topk_log_prob, max, log_sum, gradient [N, V]] of true columns ``logits_NV``.

    Args:
        offset: elements by which every row of a shard misses the alignment that it would have.
    """
    num_rows, vocab = logits_NV.shape
    selection = selection or RowSelection()
    places = reductions(backend, vocab, num_shards, temperature)
    width = padded_width(vocab, num_shards)
    padded = torch.nn.functional.pad(logits_NV, (0, num_shards * width - vocab), value=7.0)
    shards = [at_offset(part, offset) for part in padded.split(width, dim=1)]
    partials = [
        reduction.shard_partials(part, ids, selection, shard, temperature)
        for part, (shard, reduction) in zip(shards, places, strict=True)
    ]
    merged = places[0][1].merge_shards(torch.stack(partials), selection.mask)
    incoming = incoming_gradients(len(ids.target), merged.log_prob.dtype)
    arguments: list[Any] = [
        selection.spread(ids.target, num_rows),
        selection.as_mask(num_rows),
        type(merged.state)(*(selection.spread(values, num_rows) for values in merged.state)),
        selection.spread(incoming[0], num_rows),
        selection.spread(incoming[1], num_rows) if with_entropy else None,
    ]
    gradients = []
    for part, (shard, reduction) in zip(shards, places, strict=True):
        gradient = torch.full_like(part, torch.nan)
        reduction.shard_gradient(part, gradient, *arguments, shard, temperature)
        gradients.append(gradient)
    return [*merged, torch.cat(gradients, dim=1)[:, :vocab]]


def incoming_gradients(n: int, dtype: torch.dtype) -> torch.Tensor:
    """[2, n] of log-prob and entropy."""
    return torch.randn(2, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def at_offset(matrix: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy whose rows begin ``offset`` elements later in memory, and have gaps between them."""
    rows, columns = matrix.shape
    memory = matrix.new_zeros(rows, columns + 16)
    memory[:, offset : offset + columns] = matrix
    return memory[:, offset : offset + columns]
