"""Total variation and KL between two policies over the whole vocabulary, from two sets of sharded logits.

Costs what ``exact`` promises: both logits are read twice, and the tensor-parallel group exchanges two all-gathers (each
policy's normaliser) and one all-reduce (the sum over columns). No gradient: a divergence only decides about a token's
weight.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from megatron_dppo.ops.arguments import (
    KnownColumns,
    RowSelection,
    TokenIds,
    VocabShard,
    as_matrix,
    check_ids,
    check_temperature,
)
from megatron_dppo.ops.backend import Backend, choose_backend
from megatron_dppo.ops.probability import LOG_ZERO, remaining_mass
from megatron_dppo.ops.shard_merge import MergedRows, gather_shards


class KnownProbabilities(NamedTuple):
    """Tokens whose rollout probability the serving engine reported, which replaces the recomputed one.

    Attributes:
        ids: [n, S] int64 global ids, distinct among the valid ones of a row.
        log_prob: [n, S] their log-probs.
        valid: [n, S] bool; slots that are False are ignored.
    """

    ids: torch.Tensor
    log_prob: torch.Tensor
    valid: torch.Tensor


@torch.no_grad()
def vocab_parallel_divergence(
    policy_logits: torch.Tensor,
    rollout_logits: torch.Tensor,
    *,
    kind: Literal["tv", "kl"],
    token_mask: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    known: KnownProbabilities | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    checks: Literal["now", "off"] = "now",
) -> torch.Tensor:
    """D(mu || pi) at every token, summed over the whole (sharded) vocabulary.

    Args:
        policy_logits: [..., V/TP] of the policy pi being trained.
        rollout_logits: [..., V/TP] of the rollout policy mu, recomputed with the weights that generated the tokens.
        kind: ``tv`` is half the L1 distance, ``kl`` is sum mu log(mu / pi) in nats.
        token_mask: [...] bool; the other tokens are not read.
        rows: [n] int64 distinct positions in the flattened [...], instead of a mask.
        known: for a hybrid mu: the engine's probabilities where it reported them, and the recomputed distribution,
            rescaled to the mass they leave over, elsewhere. One row per result; n below is their number.
        temperature, vocab_size, tp_group, backend, checks: as for ``vocab_parallel_policy_stats``.

    Returns:
        [N] fp32, N the number of tokens, 0 outside of ``token_mask``; [n] with ``rows``. Finite and >= 0.
    """
    if rollout_logits.shape != policy_logits.shape:
        raise ValueError(
            f"rollout_logits has shape {tuple(rollout_logits.shape)}, the policy's logits {tuple(policy_logits.shape)}"
        )
    if rows is not None and token_mask is not None:
        raise ValueError("give rows or token_mask, not both: each of them says which tokens matter")
    check_temperature(temperature)
    shard = VocabShard.locate(policy_logits.shape[-1], vocab_size, tp_group)
    selection = RowSelection(rows, None if token_mask is None else token_mask.reshape(-1))
    # The kernels read both at once, so in one dtype: the wider.
    dtype = torch.promote_types(policy_logits.dtype, rollout_logits.dtype)
    policy_NV, rollout_NV = as_matrix(policy_logits.to(dtype)), as_matrix(rollout_logits.to(dtype))
    implementation = choose_backend(backend, policy_NV)

    num_results = policy_NV.shape[0] if rows is None else rows.shape[0]
    any_id = TokenIds(torch.zeros(num_results, dtype=torch.int64, device=policy_NV.device), None)
    known_ids = any_id
    if known is not None:
        ids_nS = known.ids.masked_fill(~known.valid, 0)
        known_ids = TokenIds(ids_nS[:, 0], ids_nS[:, 1:])
        if checks == "now":
            shape = policy_logits.shape[:-1] if rows is None else rows.shape
            check_ids(known_ids, selection, shape, shard.vocab_size)
    pi = _normalised(implementation, policy_NV, any_id, selection, shard, temperature)
    mu = _normalised(implementation, rollout_NV, known_ids, selection, shard, temperature)
    sums_n = implementation.shard_divergence(
        kind,
        policy_NV,
        pi.normaliser,
        rollout_NV,
        mu.normaliser,
        selection,
        None if known is None else _known_columns(known, mu),
        shard,
        temperature,
    )
    if tp_group is not None and sums_n.numel() > 0:
        dist.all_reduce(sums_n, group=tp_group)
    return sums_n.clamp_(min=0.0)


def _normalised(
    backend: Backend,
    logits_NV: torch.Tensor,
    ids: TokenIds,
    selection: RowSelection,
    shard: VocabShard,
    temperature: float,
) -> MergedRows:
    partials = backend.shard_partials(logits_NV, ids, selection, shard, temperature)
    return backend.merge_shards(gather_shards(partials, shard.group), selection.mask)


def _known_columns(known: KnownProbabilities, recomputed: MergedRows) -> KnownColumns:
    """The reported probabilities, and what keeps the sum of all others at the mass that they leave over."""
    recomputed_nS = torch.cat([recomputed.log_prob[:, None], recomputed.topk_log_prob], dim=1)
    left_by_engine = remaining_mass(known.log_prob.to(recomputed_nS.dtype), known.valid)
    recomputed_rest = remaining_mass(recomputed_nS, known.valid)
    # Below rounding there is nothing to rescale: the quotient would be noise over noise.
    resolution = torch.finfo(recomputed_rest.dtype).eps
    log_rescale = (left_by_engine / recomputed_rest.clamp(min=resolution)).log().clamp(min=LOG_ZERO)
    return KnownColumns(known.ids.masked_fill(~known.valid, -1), known.log_prob.to(recomputed_nS.dtype), log_rescale)
