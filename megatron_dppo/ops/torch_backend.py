"""The definition, in plain torch, of what a backend computes on one rank's shard of the vocabulary.

Forward, per row with scaled logits ``z = logits / temperature`` over this shard's true columns::

    MAX      m   = max z                                     (-inf where the shard holds nothing)
    REST     s   = sum exp(z - m)           without the maximum's own term (which is 1)
    TILT     t   = sum (z - m) exp(z - m)   (the maximum's own term is 0)
    SQUARES  c   = sum exp(2 (z - m))       without the maximum's own term
    TARGET   z_t if this shard owns the target, else 0
    then K columns: z of each top-K id that this shard owns, else 0

Leaving out the maximum's own term is what keeps ``1 - p`` accurate for near-certain tokens: ``log(1 + s)`` is later
taken as ``log1p(s)``. These ``5 + K`` numbers per row are all that the shards have to exchange
(``ops/shard_merge.py``).

Backward needs no exchange: the probabilities are rebuilt from the logits and each row's maximum and log-sum.

Works through the rows in chunks, so fp32 temporaries stay within ``TEMPORARY_BYTES`` however many rows there are. fp64
logits are computed in fp64, all others in fp32. No size depends on a value, so nothing waits for the device: rows outside
a mask are computed like the others here, and their results thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from megatron_dppo.ops.arguments import FLOATING, KnownColumns, Normaliser, RowSelection, RowState, TokenIds, VocabShard
from megatron_dppo.ops.probability import LOG_ZERO
from megatron_dppo.ops.shard_merge import (
    MAX,
    REST,
    SQUARES,
    STATE_COLUMNS,
    TARGET,
    TILT,
    MergedRows,
    finish_rows,
    merge_shards,
)
from megatron_dppo.ops.tile_tree import NODE_COLUMNS, TileTree, shard_nodes, tree_root

__all__ = [
    "dtypes",
    "merge_shards",
    "merge_tile_nodes",
    "name",
    "operators",
    "shard_divergence",
    "shard_gradient",
    "shard_partials",
    "tile_nodes",
]

name = "torch"
dtypes = FLOATING
operators = None

TEMPORARY_BYTES = 32 * 2**20
_TEMPORARIES = 3  # [chunk, V] tensors alive at once, below
# Far under log of the smallest float: exp() of it is exactly 0, and unlike -inf it times 0 is 0 and not NaN.
_NO_PROBABILITY = -1e4


def shard_partials(
    logits_NV: torch.Tensor, ids: TokenIds, selection: RowSelection, shard: VocabShard, temperature: float
) -> torch.Tensor:
    """One read of the selected rows of a shard.

    Args:
        logits_NV: [N, V/TP] logits.
        ids: whose logits to gather, one row for each selected row.
        selection: which rows matter.
        shard: which columns these are.
        temperature: divides the logits.

    Returns:
        [n, 5 + K], fp32 (fp64 for fp64 logits); the columns are listed above. With a mask n = N, and rows outside are 0.
    """
    dtype = compute_dtype(logits_NV)
    ids_nC = ids.target[:, None] if ids.topk is None else torch.cat([ids.target[:, None], ids.topk], dim=1)
    n = ids.target.shape[0]
    partials = torch.zeros(n, STATE_COLUMNS + ids_nC.shape[1], dtype=dtype, device=logits_NV.device)
    partials[:, MAX] = -torch.inf
    if shard.num_columns > 0:
        for part in row_chunks(n, logits_NV.shape[1], dtype):
            z = read_rows(logits_NV, selection.rows, part, shard.num_columns).to(dtype) / temperature
            local_ids = ids_nC[part] - shard.first_column
            owned = (local_ids >= 0) & (local_ids < shard.num_columns)
            gathered = z.gather(1, local_ids.clamp(0, shard.num_columns - 1))
            partials[part, TARGET:] = torch.where(owned, gathered, 0.0)

            maximum, at = z.max(dim=1, keepdim=True)
            # A row of -inf only: subtract 0, not -inf, so that every exp() is 0 and not NaN.
            z -= maximum.masked_fill(maximum == -torch.inf, 0.0)
            e = z.exp().scatter_(1, at, 0.0)
            partials[part, MAX] = maximum[:, 0]
            partials[part, REST] = e.sum(dim=1)
            partials[part, TILT] = z.clamp_(min=_NO_PROBABILITY).mul_(e).sum(dim=1)
            partials[part, SQUARES] = e.square_().sum(dim=1)
    return partials if selection.mask is None else partials.masked_fill_(~selection.mask[:, None], 0.0)


def tile_nodes(
    logits_NV: torch.Tensor,
    ids: TokenIds,
    selection: RowSelection,
    shard: VocabShard,
    tree: TileTree,
    temperature: float,
) -> torch.Tensor:
    """``shard_partials`` in an order that no layout changes (``ops/tile_tree.py``).

    Returns:
        [n, 4 nodes + 1 + K]: the shard's nodes, the target's z, K more z.
    """
    dtype = compute_dtype(logits_NV)
    ids_nC = ids.target[:, None] if ids.topk is None else torch.cat([ids.target[:, None], ids.topk], dim=1)
    n = ids.target.shape[0]
    partials = torch.zeros(n, NODE_COLUMNS * tree.nodes + ids_nC.shape[1], dtype=dtype, device=logits_NV.device)
    for part in row_chunks(n, logits_NV.shape[1], dtype):
        x = read_rows(logits_NV, selection.rows, part, shard.num_columns).to(dtype)
        partials[part, : NODE_COLUMNS * tree.nodes] = shard_nodes(x, tree, temperature).flatten(1)
        if shard.num_columns > 0:
            local_ids = ids_nC[part] - shard.first_column
            owned = (local_ids >= 0) & (local_ids < shard.num_columns)
            gathered = x.gather(1, local_ids.clamp(0, shard.num_columns - 1)) / temperature
            partials[part, NODE_COLUMNS * tree.nodes :] = torch.where(owned, gathered, 0.0)
    return partials if selection.mask is None else partials.masked_fill_(~selection.mask[:, None], 0.0)


def merge_tile_nodes(
    partials_RnC: torch.Tensor, mask_n: torch.Tensor | None, tree: TileTree, temperature: float
) -> MergedRows:
    """[TP, n, 4 nodes + 1 + K] of all shards -> statistics of the rows; all 0 for rows outside of the mask."""
    nodes_RnM4, gathered = partials_RnC.split(
        [NODE_COLUMNS * tree.nodes, partials_RnC.shape[2] - NODE_COLUMNS * tree.nodes], 2
    )
    root_n4 = tree_root(nodes_RnM4.unflatten(2, (tree.nodes, NODE_COLUMNS)), tree, temperature)
    max_n, rest_n, tilt_n, squares_n = root_n4.unbind(-1)
    state = torch.stack([max_n / temperature, rest_n, tilt_n / temperature, squares_n], dim=1)
    return finish_rows(torch.cat([state, gathered.sum(0)], dim=1), mask_n)


def shard_gradient(
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
    """Write the gradient of every row into ``grad_NV``, which may be ``logits_NV`` itself.

    With p the softmax of z: d log_prob / d z_j = [j is the target] - p_j and d entropy / d z_j = -p_j (log p_j +
    entropy). Padded columns, and rows outside of the mask, are set to exactly 0.
    """
    num_columns, dtype = shard.num_columns, compute_dtype(logits_NV)
    for part in row_chunks(target_N.shape[0], logits_NV.shape[1], dtype):
        log_p = logits_NV[part, :num_columns].to(dtype) / temperature
        log_p -= state.max[part, None]
        log_p -= state.log_sum[part, None]
        log_p.clamp_(min=_NO_PROBABILITY)
        grad = log_p.exp()
        if grad_entropy_N is None:
            factor = torch.zeros_like(log_p[:, :1])
        else:
            factor = log_p.add_(state.entropy[part, None]).mul_(-grad_entropy_N[part, None])
        if grad_log_prob_N is not None:
            factor -= grad_log_prob_N[part, None]
        grad *= factor

        # The target's own column again, from log_prob: 1 - p would lose a near-certain token's digits.
        log_prob = state.log_prob[part]
        own = torch.zeros_like(log_prob)
        if grad_log_prob_N is not None:
            own -= grad_log_prob_N[part] * torch.expm1(log_prob)
        if grad_entropy_N is not None:
            finite = log_prob.clamp(min=_NO_PROBABILITY)
            own -= grad_entropy_N[part] * finite.exp() * (finite + state.entropy[part])
        _write_to_owned(grad, target_N[part, None] - shard.first_column, own[:, None])

        grad.div_(temperature)
        if mask_N is not None:
            grad.masked_fill_(~mask_N[part, None], 0.0)
        grad_NV[part, :num_columns] = grad.to(grad_NV.dtype)
        grad_NV[part, num_columns:] = 0.0


def shard_divergence(
    kind: Literal["tv", "kl"],
    policy_NV: torch.Tensor,
    policy: Normaliser,
    rollout_NV: torch.Tensor,
    rollout: Normaliser,
    selection: RowSelection,
    known: KnownColumns | None,
    shard: VocabShard,
    temperature: float,
) -> torch.Tensor:
    """[n] this shard's share of D(mu || pi): ``tv`` is half the L1 distance, ``kl`` is sum mu log(mu / pi).

    mu is the rollout policy, whose log-probs may be known from elsewhere for some tokens.
    """
    sums_n = torch.zeros_like(policy.max)
    for part in row_chunks(sums_n.shape[0], policy_NV.shape[1], sums_n.dtype):

        def log_probs(logits_NV: torch.Tensor, normaliser: Normaliser, part: slice = part) -> torch.Tensor:
            z = read_rows(logits_NV, selection.rows, part, shard.num_columns).to(sums_n.dtype) / temperature
            return z.sub_(normaliser.max[part, None]).sub_(normaliser.log_sum[part, None])

        log_pi, log_mu = log_probs(policy_NV, policy), log_probs(rollout_NV, rollout)
        if known is not None:
            log_mu += known.log_rescale[part, None]
            local_nS = (known.ids[part] - shard.first_column).masked_fill(known.ids[part] < 0, -1)
            _write_to_owned(log_mu, local_nS, known.log_prob[part].to(log_mu.dtype))
        log_pi.clamp_(min=LOG_ZERO)
        log_mu.clamp_(min=LOG_ZERO)
        if kind == "tv":
            sums_n[part] = 0.5 * (log_mu.exp_() - log_pi.exp_()).abs_().sum(dim=1)
        else:
            sums_n[part] = (log_mu.exp() * (log_mu - log_pi)).sum(dim=1)
    return sums_n if selection.mask is None else sums_n.masked_fill_(~selection.mask, 0.0)


def compute_dtype(logits: torch.Tensor) -> torch.dtype:
    """fp64 stays fp64 (reference computations); everything else is reduced in fp32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def row_chunks(num_rows: int, width: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of rows whose temporaries fit into ``TEMPORARY_BYTES``."""
    step = max(1, TEMPORARY_BYTES // (_TEMPORARIES * dtype.itemsize * max(width, 1)))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def read_rows(logits_NV: torch.Tensor, rows: torch.Tensor | None, part: slice, num_columns: int) -> torch.Tensor:
    """The true columns of a chunk of the selected rows."""
    chunk = logits_NV[part] if rows is None else logits_NV.index_select(0, rows[part])
    return chunk[:, :num_columns]


def _write_to_owned(values_nV: torch.Tensor, columns_nS: torch.Tensor, new_nS: torch.Tensor) -> None:
    """``values[i, columns[i, s]] = new[i, s]``; columns outside of the shard are another's and are skipped.

    Columns of one row that are inside must differ. An index of data-dependent length would say it in a line and wait for
    the device; here a skipped slot writes into a column that is cut off again.
    """
    width = values_nV.shape[1]
    outside = (columns_nS < 0) | (columns_nS >= width)
    widened = torch.nn.functional.pad(values_nV, (0, 1))
    widened.scatter_(1, columns_nS.masked_fill(outside, width), new_nS)
    values_nV.copy_(widened[:, :width])
