"""Statistics that are the same bits in every layout: the contract, and its definition in plain torch.

A sum of floats depends on its order, and the usual order follows the shards: with another tensor-parallel size the last bits
of every log-prob change. With ``deterministic="layout"`` they do not:

* a row is reduced in tiles of 128 *global* columns, in an order of the column in its tile alone;
* the tiles are merged along one fixed binary tree over the global tile index, the perfect one of the next power of two. A
  tile beyond the vocabulary is empty, and merging with an empty one gives the other side's bits, so that neither padding nor
  the number of tiles matters;
* a shard is a run of tiles: a few whole nodes of that tree, at each tile the largest that begins there and fits. Ranks
  exchange these nodes, ``4 nodes + 1 + K`` numbers per token instead of ``5 + K``, and each of them merges the rest.

A node is [MAX, REST, TILT, SQUARES] as in ``ops/torch_backend.py``, but MAX and TILT in the units of the logits. The compiled
kernels (csrc/core/tile_tree.h) keep the same contract with roundings of their own: layouts are compared on one backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megatron_dppo.ops.arguments import VocabShard

TILE_COLUMNS = 128
NODE_COLUMNS = 4  # max, rest, tilt, squares

Deterministic = Literal["off", "layout"]
DETERMINISTIC: tuple[Deterministic, ...] = ("off", "layout")


def deterministic_choice(name: str) -> Deterministic:
    """The choice of this name; ValueError for what is none."""
    for choice in DETERMINISTIC:
        if name == choice:
            return choice
    raise ValueError(f"deterministic must be one of {', '.join(DETERMINISTIC)}, not {name!r}")


def node_runs(first: int, end: int) -> Iterator[tuple[int, int]]:
    """The largest nodes of the tree that make up tiles [first, end), from the left: (first tile, end)."""
    while first < end:
        tiles = 1
        while first % (2 * tiles) == 0 and first + 2 * tiles <= end:
            tiles *= 2
        yield first, first + tiles
        first += tiles


@dataclass(frozen=True)
class TileTree:
    """This rank's place in the tree.

    Attributes:
        first_tile: global index of the shard's first tile.
        shard_tiles: tiles of every shard.
        num_shards: of the vocabulary.
        nodes: the most that any shard has; the others exchange empty ones.
    """

    first_tile: int
    shard_tiles: int
    num_shards: int
    nodes: int

    @classmethod
    def of(cls, shard: VocabShard, width: int) -> TileTree:
        """Of a shard of ``width`` columns.

        Raises:
            ValueError: shards do not begin where tiles do.
        """
        num_shards = 1 if shard.group is None else dist.get_world_size(shard.group)
        if num_shards > 1 and width % TILE_COLUMNS != 0:
            raise ValueError(
                f"deterministic='layout' works on whole tiles of {TILE_COLUMNS} columns, but a shard has {width}: pad the "
                f"vocabulary to a multiple of {TILE_COLUMNS} * {num_shards}, as Megatron does with "
                f"make_vocab_size_divisible_by={TILE_COLUMNS}"
            )
        tiles = -(-width // TILE_COLUMNS)
        nodes = max(sum(1 for _ in node_runs(r * tiles, (r + 1) * tiles)) for r in range(num_shards))
        return cls(shard.first_column // TILE_COLUMNS, tiles, num_shards, nodes)

    def node_slices(self) -> list[slice]:
        """Of this shard's tiles, counted from its first: one slice for each of its nodes."""
        end = self.first_tile + self.shard_tiles
        return [slice(a - self.first_tile, b - self.first_tile) for a, b in node_runs(self.first_tile, end)]

    def node_sizes(self) -> list[list[tuple[int, int]]]:
        """For every shard, (first tile, end) of its nodes."""
        return [list(node_runs(r * self.shard_tiles, (r + 1) * self.shard_tiles)) for r in range(self.num_shards)]


def shard_nodes(x_nV: torch.Tensor, tree: TileTree, temperature: float) -> torch.Tensor:
    """[n, nodes, 4] of the true columns [n, V'] of a shard, in the dtype of ``x_nV``."""
    missing = tree.shard_tiles * TILE_COLUMNS - x_nV.shape[1]
    padded = torch.nn.functional.pad(x_nV, (0, missing), value=-torch.inf)
    tiles_nt4 = _reduce_tiles(padded.view(x_nV.shape[0], tree.shard_tiles, TILE_COLUMNS), temperature)
    nodes_nM4 = x_nV.new_zeros(x_nV.shape[0], tree.nodes, NODE_COLUMNS)
    nodes_nM4[..., 0] = -torch.inf
    for index, tiles in enumerate(tree.node_slices()):
        level = tiles_nt4[:, tiles]
        while level.shape[1] > 1:
            level = _merge(level[:, 0::2], level[:, 1::2], temperature)
        nodes_nM4[:, index] = level[:, 0]
    return nodes_nM4


def tree_root(nodes_RnM4: torch.Tensor, tree: TileTree, temperature: float) -> torch.Tensor:
    """[TP, n, nodes, 4] of all shards -> [n, 4] of the whole rows."""
    waiting: list[torch.Tensor] = []
    for rank, runs in enumerate(tree.node_sizes()):
        for index, (first, end) in enumerate(runs):
            state, tiles = nodes_RnM4[rank, :, index], end - first
            while first // tiles % 2 == 1:  # a right child: its sibling is the last that waits
                state = _merge(waiting.pop(), state, temperature)
                first, tiles = first - tiles, 2 * tiles
            waiting.append(state)
    root = waiting.pop()
    while waiting:  # their right siblings are part of the root, or absent
        root = _merge(waiting.pop(), root, temperature)
    return root


def tree_sum(parts: Iterator[torch.Tensor], tree: TileTree) -> torch.Tensor:
    """[nodes, ...] sums of a shard's tiles along the tree, of one tensor for each tile; unused nodes are 0.

    The tensors are added to in place; at most one for each level of the tree exists at a time.
    """
    sums: list[torch.Tensor] = []
    for tiles in tree.node_slices():
        waiting: list[torch.Tensor] = []
        for index in range(tiles.stop - tiles.start):
            state = next(parts)
            while index % 2 == 1:
                state = waiting.pop().add_(state)
                index //= 2
            waiting.append(state)
        sums.append(waiting[0])
    sums += [torch.zeros_like(sums[0]) for _ in range(tree.nodes - len(sums))]
    return torch.stack(sums)


def root_sum(nodes_RM: torch.Tensor, tree: TileTree) -> torch.Tensor:
    """[TP, nodes, ...] of ``tree_sum`` on all ranks -> their sum along the tree; -0 becomes 0."""
    waiting: list[torch.Tensor] = []
    for rank, runs in enumerate(tree.node_sizes()):
        for index, (first, end) in enumerate(runs):
            state, tiles = nodes_RM[rank, index], end - first
            while first // tiles % 2 == 1:
                state = waiting.pop() + state
                first, tiles = first - tiles, 2 * tiles
            waiting.append(state)
    root = waiting.pop() + 0.0
    while waiting:
        root = waiting.pop() + root
    return root


def _reduce_tiles(x_nt128: torch.Tensor, temperature: float) -> torch.Tensor:
    """[n, tiles, 128] -> [n, tiles, 4]."""
    maximum = x_nt128.amax(dim=-1, keepdim=True) + 0.0  # of 0 and -0, 0
    # A tile of -inf only: subtract 0, not -inf, so that every exp() is 0 and not NaN.
    d = (x_nt128 - maximum.masked_fill(maximum == -torch.inf, 0.0)).clamp_(min=_LOWEST)
    at_max = (d >= 0.0) & (maximum > -torch.inf)
    e = (d / temperature).exp_().masked_fill_(at_max, 0.0)
    # One occurrence of the maximum stays left out. A tile of -inf only has none.
    others = (_halved(at_max.to(e.dtype)) - 1.0).clamp_(min=0.0)
    return torch.stack([maximum[..., 0], _halved(e) + others, _halved(d * e), _halved(e * e) + others], dim=-1)


_LOWEST = -1e30  # of a difference of logits: exp() of it is 0, and unlike -inf it times 0 is 0 and not NaN


def _halved(terms: torch.Tensor) -> torch.Tensor:
    """Sums of 128 neighbours, element by element: torch's own sums follow the shape."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def _merge(left: torch.Tensor, right: torch.Tensor, temperature: float) -> torch.Tensor:
    """[..., 4] state of a parent from those of its children."""
    leads = (left[..., :1] >= right[..., :1]).expand_as(left)
    high, low = torch.where(leads, left, right), torch.where(leads, right, left)
    # Two empty ones differ by NaN, but neither result is taken.
    d = (low[..., 0] - high[..., 0]).clamp(min=_LOWEST)
    e = (d / temperature).exp()
    elements = low[..., 1] + 1.0
    merged = torch.stack(
        [
            torch.maximum(left[..., 0], right[..., 0]),
            high[..., 1] + e * elements,
            high[..., 2] + e * (low[..., 2] + d * elements),
            high[..., 3] + e * e * (low[..., 3] + 1.0),
        ],
        dim=-1,
    )
    merged = torch.where(left[..., :1] == -torch.inf, right, merged)
    return torch.where(right[..., :1] == -torch.inf, left, merged)
