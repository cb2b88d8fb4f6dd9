"""What every token is worth: divergence, direction and trust region put together.

D = D(mu || pi);  outward: where the update would lead;  w = w(D, outward, ...);  the gradient is w r A grad(log pi)

This is the definition; ``loss/fused_objective.py`` is the same in one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_dppo.loss import divergences
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.inputs import FlatTokens
from megatron_dppo.loss.metrics import MetricSums, token_metrics
from megatron_dppo.loss.trust_region import predictive_direction, ratio_direction, token_weight
from megatron_dppo.ops.policy_stats import PolicyStats

_LOG_RATIO_CLAMP = 20.0  # exp() must not overflow; not a trust region


@dataclass(frozen=True)
class TokenObjective:
    """Of N tokens; 0 outside the mask. Nothing here carries gradient.

    Attributes:
        coefficient: [N] w r A.
        weight: [N] w.
        divergence: [N] D(mu || pi).
        loss: scalar, the sum of -w r A.
        num_tokens: scalar int64, how many are in the mask.
        metrics: sums over the tokens of the mask.
    """

    coefficient: torch.Tensor
    weight: torch.Tensor
    divergence: torch.Tensor
    loss: torch.Tensor
    num_tokens: torch.Tensor
    metrics: MetricSums

    @classmethod
    def joined(cls, blocks: Sequence[TokenObjective]) -> TokenObjective:
        """Of all tokens, from those of blocks of them in order."""
        if len(blocks) == 1:
            return blocks[0]
        return cls(
            coefficient=torch.cat([block.coefficient for block in blocks]),
            weight=torch.cat([block.weight for block in blocks]),
            divergence=torch.cat([block.divergence for block in blocks]),
            loss=torch.stack([block.loss for block in blocks]).sum(),
            num_tokens=torch.stack([block.num_tokens for block in blocks]).sum(),
            metrics=MetricSums.total([block.metrics for block in blocks]),
        )


def token_objective(
    config: DPPOConfig,
    tokens: FlatTokens,
    policy: PolicyStats,
    exact_divergence: torch.Tensor | None,
    vocab_size: int,
) -> TokenObjective:
    """Decide about every token.

    Args:
        config: divergence, direction, trust region.
        tokens: what the rollout engine reported.
        policy: [N] statistics of the policy at these tokens, detached; ``topk_log_prob`` [N, K] as ``tokens.topk_ids``.
        exact_divergence: [N] D for exact_*, else None.
        vocab_size: true size of the vocabulary.
    """
    tokens = tokens.cleaned()
    log_mu, log_pi = tokens.rollout_log_probs, policy.log_prob
    log_ratio = log_pi - log_mu
    ratio = log_ratio.clamp(-_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP).exp()
    capped_ratio = ratio if config.ratio_cap is None else ratio.clamp(max=config.ratio_cap)
    mu, pi = log_mu.exp(), log_pi.exp()
    divergence = _divergence(config, tokens, policy) if exact_divergence is None else exact_divergence
    outward = _outward(config, tokens, policy, vocab_size)
    weight = token_weight(config, tokens.advantages, log_ratio, capped_ratio, pi - mu, divergence, outward)
    coefficient = tokens.masked(weight * capped_ratio * tokens.advantages)
    return TokenObjective(
        coefficient=coefficient,
        weight=tokens.masked(weight),
        divergence=tokens.masked(divergence),
        loss=-coefficient.sum(),
        num_tokens=tokens.count(),
        metrics=token_metrics(
            tokens.advantages, log_ratio, ratio, mu, pi, divergence, weight, coefficient, policy.entropy, tokens.mask
        ),
    )


def _divergence(config: DPPOConfig, tokens: FlatTokens, policy: PolicyStats) -> torch.Tensor:
    if config.partition == "binary":
        binary = divergences.binary_tv if config.kind == "tv" else divergences.binary_kl
        return binary(tokens.rollout_log_probs, policy.log_prob)
    known = _known_tokens(tokens, policy)
    return divergences.topk_tv(known) if config.kind == "tv" else divergences.topk_kl(known)


def _outward(config: DPPOConfig, tokens: FlatTokens, policy: PolicyStats, vocab_size: int) -> torch.Tensor:
    log_mu, log_pi = tokens.rollout_log_probs, policy.log_prob
    if config.direction == "ratio":
        return ratio_direction(tokens.advantages, log_pi - log_mu)
    if config.direction == "symmetric":
        return torch.ones_like(log_pi)
    known = _known_tokens(tokens, policy)
    return predictive_direction(
        tokens.advantages, log_mu, log_pi, known, policy.collision, vocab_size, config.predictive_estimator
    )


def _known_tokens(tokens: FlatTokens, policy: PolicyStats) -> divergences.KnownTokens:
    return divergences.known_tokens(
        tokens.rollout_log_probs,
        policy.log_prob,
        tokens.target,
        tokens.topk_ids,
        tokens.topk_log_probs,
        policy.topk_log_prob,
    )
