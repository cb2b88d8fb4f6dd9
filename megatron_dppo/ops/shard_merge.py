"""Merging what the shards of a vocabulary found: one packed all-gather, then arithmetic that every rank repeats.

Each shard describes a row by ``5 + K`` numbers (``ops/torch_backend.py`` lists them), relative to its own maximum. With
M the global maximum and ``d = m - M``, a shard's sums move to the common scale as::

    rest    <- exp(d) (s + [its maximum is not the one left out])
    tilt    <- exp(d) (t + d (1 + s))
    squares <- exp(2 d) (c + [its maximum is not the one left out])

and add up. One maximum, of one shard, stays left out: ``log(sum exp(z - M)) = log1p(rest)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_dppo.ops.arguments import Normaliser, RowState

MAX, REST, TILT, SQUARES, TARGET = range(5)
STATE_COLUMNS = 4  # the reduction's state; gathered logits (the target's, then the top-K's) follow


class MergedRows(NamedTuple):
    """Statistics of n rows over the whole vocabulary.

    Attributes:
        log_prob: [n] of the target.
        entropy: [n] in nats.
        collision: [n] sum of squared probabilities.
        topk_log_prob: [n, K].
        max: [n] the largest scaled logit.
        log_sum: [n] log sum exp(z - max).
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    collision: torch.Tensor
    topk_log_prob: torch.Tensor
    max: torch.Tensor
    log_sum: torch.Tensor

    @property
    def normaliser(self) -> Normaliser:
        """``max`` and ``log_sum``."""
        return Normaliser(self.max, self.log_sum)

    @property
    def state(self) -> RowState:
        """What the backward needs."""
        return RowState(self.log_prob, self.entropy, self.max, self.log_sum)


def gather_shards(partials_nC: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[n, C] of this rank -> [TP, n, C] of all ranks, in rank order: the only collective of a forward.

    ``group=None`` means that the logits are whole. With no rows there is nothing to exchange; every rank sees the same
    token mask, so either all of them skip the collective or none does.
    """
    if group is None or dist.get_world_size(group) == 1 or partials_nC.shape[0] == 0:
        return partials_nC[None]
    gathered = partials_nC.new_empty(dist.get_world_size(group) * partials_nC.shape[0], partials_nC.shape[1])
    all_gather_rows(gathered, partials_nC, group)
    return gathered.view(-1, *partials_nC.shape)


def all_gather_rows(gathered: torch.Tensor, local: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill [R n, ...] with every rank's contiguous [n, ...], in rank order."""
    # The same collective under its newer name; torch from 2.13 on warns about the older, before 2.12 has no other.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(gathered, local, group=group)


def merge_chunks(partials_RnC: torch.Tensor) -> torch.Tensor:
    """[R, n, 5 + K] partials of R runs of columns -> [n, 5 + K], the partials of all their columns as one shard's."""
    state, gathered = partials_RnC[..., :STATE_COLUMNS], partials_RnC[..., STATE_COLUMNS:]
    max_Rn, rest_Rn, tilt_Rn, squares_Rn = state.unbind(-1)
    max_n, leader_n = max_Rn.max(dim=0)
    # A shard without probability has maximum -inf. Its sums are 0 and -inf must not meet them (nor -inf - -inf).
    empty_Rn = max_Rn == -torch.inf
    shift_Rn = (max_Rn - max_n).masked_fill(empty_Rn, 0.0)
    scale_Rn = shift_Rn.exp().masked_fill(empty_Rn, 0.0)
    counted_Rn = torch.ones_like(rest_Rn).scatter_(0, leader_n[None], 0.0)

    rest_n = (scale_Rn * (rest_Rn + counted_Rn)).sum(0)
    tilt_n = (scale_Rn * (tilt_Rn + shift_Rn * (1.0 + rest_Rn))).sum(0)
    squares_n = (scale_Rn.square() * (squares_Rn + counted_Rn)).sum(0)
    # Exactly one shard owns each id and the others sent 0, so the sum is a selection.
    return torch.cat([torch.stack([max_n, rest_n, tilt_n, squares_n], dim=1), gathered.sum(0)], dim=1)


def merge_shards(partials_RnC: torch.Tensor, mask_n: torch.Tensor | None = None) -> MergedRows:
    """[TP, n, 5 + K] partials of all shards -> statistics of the rows; all 0 for rows outside of the mask."""
    return finish_rows(merge_chunks(partials_RnC), mask_n)


def finish_rows(whole_nC: torch.Tensor, mask_n: torch.Tensor | None) -> MergedRows:
    """[n, 5 + K] partials of whole rows -> their statistics; all 0 for rows outside of the mask."""
    max_n, rest_n, tilt_n, squares_n = whole_nC[:, :STATE_COLUMNS].unbind(-1)
    log_sum_n = rest_n.log1p()
    total_n = 1.0 + rest_n
    log_prob_nC = (whole_nC[:, STATE_COLUMNS:] - max_n[:, None]) - log_sum_n[:, None]
    merged = MergedRows(
        log_prob=log_prob_nC[:, 0],
        entropy=log_sum_n - tilt_n / total_n,
        collision=(1.0 + squares_n) / total_n.square(),
        topk_log_prob=log_prob_nC[:, 1:],
        max=max_n,
        log_sum=log_sum_n,
    )
    if mask_n is None:
        return merged
    return MergedRows(
        *(values.masked_fill(~(mask_n[:, None] if values.dim() == 2 else mask_n), 0.0) for values in merged)
    )
