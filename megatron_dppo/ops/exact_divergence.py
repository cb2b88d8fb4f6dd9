"""Total variation and KL between two policies over the whole vocabulary, from two sets of sharded logits.

Costs what ``exact`` promises: both logits are read twice, and the tensor-parallel group exchanges two all-gathers (each
policy's normaliser) and one all-reduce (the sum over columns). No gradient: a divergence only decides about a token's
weight.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from megatron_dppo.ops.backend import choose_backend
from megatron_dppo.ops.policy_stats import as_matrix, check_ids, locate_shard
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
    kind: Literal["tv", "kl"],
    policy_logits: torch.Tensor,
    rollout_logits: torch.Tensor,
    token_mask: torch.Tensor,
    known: KnownProbabilities | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """D(mu || pi) at the n tokens of the mask, summed over the whole (sharded) vocabulary.

    Args:
        kind: ``tv`` is half the L1 distance, ``kl`` is sum mu log(mu / pi) in nats.
        policy_logits: [..., V/TP] of the policy pi being trained.
        rollout_logits: [..., V/TP] of the rollout policy mu, recomputed with the weights that generated the tokens.
        token_mask: [...] bool.
        known: for a hybrid mu: the engine's probabilities where it reported them, and the recomputed distribution,
            rescaled to the mass they leave over, elsewhere. One row per selected token.
        temperature, vocab_size, tp_group, backend: as for ``vocab_parallel_policy_stats``.

    Returns:
        [n] fp32, n the number of tokens in the mask; finite and >= 0.
    """
    if rollout_logits.shape != policy_logits.shape:
        raise ValueError(
            f"rollout_logits has shape {tuple(rollout_logits.shape)}, the policy's logits {tuple(policy_logits.shape)}"
        )
    shard = locate_shard(policy_logits, vocab_size, tp_group)
    rows = token_mask.reshape(-1).nonzero()[:, 0]
    # The kernels read both at once, so in one dtype: the wider.
    dtype = torch.promote_types(policy_logits.dtype, rollout_logits.dtype)
    policy_NV, rollout_NV = as_matrix(policy_logits.to(dtype)), as_matrix(rollout_logits.to(dtype))
    implementation = choose_backend(backend, policy_NV)

    def normaliser(logits_NV: torch.Tensor, ids_nS: torch.Tensor) -> MergedRows:
        partials = implementation.shard_partials(
            logits_NV, rows, ids_nS[:, 0], ids_nS[:, 1:], temperature, shard.first_column, shard.num_columns
        )
        return implementation.merge_shards(gather_shards(partials, shard.group))

    any_id_n1 = rows.new_zeros(rows.shape[0], 1)
    known_ids_nS = any_id_n1 if known is None else known.ids.masked_fill(~known.valid, 0)
    check_ids("topk_ids", known_ids_nS, rows, token_mask.shape, shard.vocab_size)
    pi, mu = normaliser(policy_NV, any_id_n1), normaliser(rollout_NV, known_ids_nS)
    sums_n = implementation.shard_divergence(
        kind,
        policy_NV,
        rollout_NV,
        rows,
        pi,
        mu,
        None if known is None else known.ids.masked_fill(~known.valid, -1),
        None if known is None else known.log_prob.to(pi.max.dtype),
        None if known is None else _log_rescale(known, mu),
        temperature,
        shard.first_column,
        shard.num_columns,
    )
    if tp_group is not None and sums_n.numel() > 0:
        dist.all_reduce(sums_n, group=tp_group)
    return sums_n.clamp_(min=0.0)


def _log_rescale(known: KnownProbabilities, recomputed: MergedRows) -> torch.Tensor:
    """[n] log of (mass the engine leaves to the other tokens) / (mass the recomputed policy gives them)."""
    recomputed_nS = torch.cat([recomputed.log_prob[:, None], recomputed.topk_log_prob], dim=1)
    left_by_engine = remaining_mass(known.log_prob.to(recomputed_nS.dtype), known.valid)
    recomputed_rest = remaining_mass(recomputed_nS, known.valid)
    # Below rounding there is nothing to rescale: the quotient would be noise over noise.
    resolution = torch.finfo(recomputed_rest.dtype).eps
    return (left_by_engine / recomputed_rest.clamp(min=resolution)).log().clamp(min=LOG_ZERO)
