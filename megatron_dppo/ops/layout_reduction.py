"""A backend's statistics and gradients as the same bits in every layout, by the tiles and the tree of ``ops/tile_tree.py``.

Only what adds up over the vocabulary differs from the backend's usual way. The gradient of the logits is made element by
element from the merged state, so it is the same bits as soon as the state is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dppo.ops.arguments import RowSelection, RowState, TokenIds, VocabShard
from megatron_dppo.ops.backend import Backend, Reduction
from megatron_dppo.ops.shard_merge import MergedRows
from megatron_dppo.ops.tile_tree import TileTree, deterministic_choice


@dataclass(frozen=True)
class LayoutReduction:
    """A ``Reduction`` for the whole shards of one call."""

    backend: Backend
    tree: TileTree
    temperature: float

    def shard_partials(
        self, logits_NV: torch.Tensor, ids: TokenIds, selection: RowSelection, shard: VocabShard, temperature: float
    ) -> torch.Tensor:
        """[n, 4 nodes + 1 + K]: the nodes of this shard, then the gathered logits."""
        return self.backend.tile_nodes(logits_NV, ids, selection, shard, self.tree, temperature)

    def merge_shards(self, partials_RnC: torch.Tensor, mask_n: torch.Tensor | None) -> MergedRows:
        """Of [TP, n, 4 nodes + 1 + K]."""
        return self.backend.merge_tile_nodes(partials_RnC, mask_n, self.tree, self.temperature)

    def shard_gradient(
        self,
        logits_NV: torch.Tensor,
        grad_NV: torch.Tensor,
        target_N: torch.Tensor,
        mask_N: torch.Tensor | None,
        state: RowState,
        grad_log_prob_N: torch.Tensor | None,
        grad_entropy_N: torch.Tensor | None,
        shard: VocabShard,
        temperature: float,
    ) -> None:
        """The backend's own."""
        self.backend.shard_gradient(
            logits_NV, grad_NV, target_N, mask_N, state, grad_log_prob_N, grad_entropy_N, shard, temperature
        )


def choose_reduction(
    deterministic: str, backend: Backend, shard: VocabShard, width: int, temperature: float
) -> Reduction:
    """How the shards of ``width`` columns are reduced: by the backend as it is, or the same in every layout.

    Raises:
        ValueError: ``deterministic`` is none of its choices, or layout and shards do not begin where tiles do.
    """
    if deterministic_choice(deterministic) == "off":
        return backend
    return LayoutReduction(backend, TileTree.of(shard, width), temperature)
