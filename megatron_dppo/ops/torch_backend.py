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
logits are computed in fp64, all others in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from megatron_dppo.ops.probability import LOG_ZERO
from megatron_dppo.ops.shard_merge import (
    MAX,
    REST,
    SQUARES,
    STATE_COLUMNS,
    TARGET,
    TILT,
    MergedRows,
    merge_shards,
)

__all__ = ["merge_shards", "shard_divergence", "shard_gradient", "shard_partials"]

TEMPORARY_BYTES = 32 * 2**20
_TEMPORARIES = 3  # [chunk, V] tensors alive at once, below
# Far under log of the smallest float: exp() of it is exactly 0, and unlike -inf it times 0 is 0 and not NaN.
_NO_PROBABILITY = -1e4


def shard_partials(
    logits_NV: torch.Tensor,
    rows: torch.Tensor | None,
    target_n: torch.Tensor,
    topk_ids_nK: torch.Tensor | None,
    temperature: float,
    first_column: int,
    num_columns: int,
) -> torch.Tensor:
    """One read of the selected rows of a shard.

    Args:
        logits_NV: [N, V/TP] logits.
        rows: [n] int64 rows that matter, or None for all of them (then n = N).
        target_n: [n] int64 global ids.
        topk_ids_nK: [n, K] int64 global ids, or None.
        temperature: divides the logits.
        first_column: global id of this shard's column 0.
        num_columns: how many of this shard's columns, from the left, are true vocabulary; the others are padding.

    Returns:
        [n, 5 + K], fp32 (fp64 for fp64 logits); the columns are listed above.
    """
    dtype = compute_dtype(logits_NV)
    ids_nK = target_n[:, None] if topk_ids_nK is None else torch.cat([target_n[:, None], topk_ids_nK], dim=1)
    n = target_n.shape[0]
    partials = torch.zeros(n, STATE_COLUMNS + ids_nK.shape[1], dtype=dtype, device=logits_NV.device)
    partials[:, MAX] = -torch.inf
    if num_columns == 0:
        return partials
    for part in row_chunks(n, logits_NV.shape[1], dtype):
        z = read_rows(logits_NV, rows, part, num_columns).to(dtype) / temperature
        local_ids = ids_nK[part] - first_column
        owned = (local_ids >= 0) & (local_ids < num_columns)
        gathered = z.gather(1, local_ids.clamp(0, num_columns - 1))
        partials[part, TARGET:] = torch.where(owned, gathered, 0.0)

        maximum, at = z.max(dim=1, keepdim=True)
        # A row of -inf only: subtract 0, not -inf, so that every exp() is 0 and not NaN.
        z -= maximum.masked_fill(maximum == -torch.inf, 0.0)
        e = z.exp().scatter_(1, at, 0.0)
        partials[part, MAX] = maximum[:, 0]
        partials[part, REST] = e.sum(dim=1)
        partials[part, TILT] = z.clamp_(min=_NO_PROBABILITY).mul_(e).sum(dim=1)
        partials[part, SQUARES] = e.square_().sum(dim=1)
    return partials


def shard_gradient(
    logits_NV: torch.Tensor,
    grad_NV: torch.Tensor,
    rows: torch.Tensor | None,
    target_n: torch.Tensor,
    max_n: torch.Tensor,
    log_sum_n: torch.Tensor,
    log_prob_n: torch.Tensor,
    entropy_n: torch.Tensor,
    grad_log_prob_n: torch.Tensor | None,
    grad_entropy_n: torch.Tensor | None,
    temperature: float,
    first_column: int,
    num_columns: int,
) -> None:
    """Write the gradient of the selected rows into ``grad_NV``, which may be ``logits_NV`` itself.

    With p the softmax of z: d log_prob / d z_j = [j is the target] - p_j and d entropy / d z_j = -p_j (log p_j +
    entropy). Padded columns of the selected rows are set to exactly 0; rows that are not selected are not touched.
    """
    dtype = compute_dtype(logits_NV)
    for part in row_chunks(target_n.shape[0], logits_NV.shape[1], dtype):
        log_p = read_rows(logits_NV, rows, part, num_columns).to(dtype) / temperature
        log_p -= max_n[part, None]
        log_p -= log_sum_n[part, None]
        log_p.clamp_(min=_NO_PROBABILITY)
        grad = log_p.exp()
        if grad_entropy_n is None:
            factor = torch.zeros_like(log_p[:, :1])
        else:
            factor = log_p.add_(entropy_n[part, None]).mul_(-grad_entropy_n[part, None])
        if grad_log_prob_n is not None:
            factor -= grad_log_prob_n[part, None]
        grad *= factor

        # The target's own column again, from log_prob: 1 - p would lose a near-certain token's digits.
        local_target = target_n[part] - first_column
        at = ((local_target >= 0) & (local_target < num_columns)).nonzero()[:, 0]
        own = torch.zeros_like(log_prob_n[part][at])
        log_prob = log_prob_n[part][at]
        if grad_log_prob_n is not None:
            own -= grad_log_prob_n[part][at] * torch.expm1(log_prob)
        if grad_entropy_n is not None:
            finite = log_prob.clamp(min=_NO_PROBABILITY)
            own -= grad_entropy_n[part][at] * finite.exp() * (finite + entropy_n[part][at])
        grad[at, local_target[at]] = own

        _write_rows(grad_NV, rows, part, grad.div_(temperature), num_columns)


def shard_divergence(
    kind: Literal["tv", "kl"],
    policy_logits_NV: torch.Tensor,
    rollout_logits_NV: torch.Tensor,
    rows: torch.Tensor | None,
    policy: MergedRows,
    rollout: MergedRows,
    known_ids_nS: torch.Tensor | None,
    known_log_prob_nS: torch.Tensor | None,
    log_rescale_n: torch.Tensor | None,
    temperature: float,
    first_column: int,
    num_columns: int,
) -> torch.Tensor:
    """[n] this shard's share of D(mu || pi): ``tv`` is half the L1 distance, ``kl`` is sum mu log(mu / pi).

    mu is the rollout policy. Its log-probs may be known from elsewhere for some tokens (distinct global ids; -1 in slots
    that do not count); then all others are rescaled by ``exp(log_rescale_n)``.
    """
    sums_n = torch.zeros_like(policy.max)
    for part in row_chunks(sums_n.shape[0], policy_logits_NV.shape[1], sums_n.dtype):

        def log_probs(logits_NV: torch.Tensor, merged: MergedRows, part: slice = part) -> torch.Tensor:
            z = read_rows(logits_NV, rows, part, num_columns).to(merged.max.dtype) / temperature
            return z.sub_(merged.max[part, None]).sub_(merged.log_sum[part, None])

        log_pi, log_mu = log_probs(policy_logits_NV, policy), log_probs(rollout_logits_NV, rollout)
        if known_ids_nS is not None and known_log_prob_nS is not None and log_rescale_n is not None:
            log_mu += log_rescale_n[part, None]
            local_nS = known_ids_nS[part] - first_column
            owned_nS = (known_ids_nS[part] >= 0) & (local_nS >= 0) & (local_nS < num_columns)
            slot_row, slot = owned_nS.nonzero(as_tuple=True)
            log_mu[slot_row, local_nS[slot_row, slot]] = known_log_prob_nS[part][slot_row, slot].to(log_mu.dtype)
        log_pi.clamp_(min=LOG_ZERO)
        log_mu.clamp_(min=LOG_ZERO)
        if kind == "tv":
            sums_n[part] = 0.5 * (log_mu.exp_() - log_pi.exp_()).abs_().sum(dim=1)
        else:
            sums_n[part] = (log_mu.exp() * (log_mu - log_pi)).sum(dim=1)
    return sums_n


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


def _write_rows(
    grad_NV: torch.Tensor, rows: torch.Tensor | None, part: slice, grad: torch.Tensor, num_columns: int
) -> None:
    padded = grad_NV.shape[1] - num_columns
    whole = torch.nn.functional.pad(grad, (0, padded)) if padded else grad
    if rows is None:
        grad_NV[part] = whole
    else:
        grad_NV.index_copy_(0, rows[part], whole.to(grad_NV.dtype))
