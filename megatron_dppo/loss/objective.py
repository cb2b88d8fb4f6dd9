"""What every token's update is worth: divergence, direction and trust region put together.

D = D(mu || pi);  outward: where the update would lead;  w = w(D, outward, ...);  the gradient is w r A grad(log pi)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dppo.loss import divergences, metrics
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.direction import predictive_direction, ratio_direction
from megatron_dppo.loss.inputs import TokenBatch
from megatron_dppo.loss.trust_region import token_weight
from megatron_dppo.ops.policy_stats import PolicyStats

_LOG_RATIO_CLAMP = 20.0  # exp() must not overflow; not a trust region


@dataclass(frozen=True)
class TokenUpdate:
    """Of n tokens; nothing here carries gradient.

    Attributes:
        coefficient: [n] w r A.
        weight: [n] w.
        divergence: [n] D(mu || pi).
        metrics: {name: (numerator, denominator)}, fp64 scalars.
        extrema: {name: scalar}, fp64.
        divergence_histogram: int64 counts.
    """

    coefficient: torch.Tensor
    weight: torch.Tensor
    divergence: torch.Tensor
    metrics: metrics.Metrics
    extrema: dict[str, torch.Tensor]
    divergence_histogram: torch.Tensor


def token_update(
    config: DPPOConfig,
    tokens: TokenBatch,
    policy: PolicyStats,
    exact_divergence: torch.Tensor | None,
    vocab_size: int,
) -> TokenUpdate:
    """Judge every token's update.

    Args:
        config: divergence, direction, trust region.
        tokens: what the rollout engine reported.
        policy: [n] statistics of the policy at these tokens, detached; ``topk_log_prob`` [n, K] as ``tokens.topk_ids``.
        exact_divergence: [n] D for exact_*, else None.
        vocab_size: true size of the vocabulary.
    """
    log_mu, log_pi = tokens.rollout_log_probs, policy.log_prob
    log_ratio = log_pi - log_mu
    ratio = log_ratio.clamp(-_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP).exp()
    capped_ratio = ratio if config.ratio_cap is None else ratio.clamp(max=config.ratio_cap)
    mu, pi = log_mu.exp(), log_pi.exp()
    divergence = _divergence(config, tokens, policy) if exact_divergence is None else exact_divergence
    outward = _outward(config, tokens, policy, vocab_size)
    weight = token_weight(config, tokens.advantages, log_ratio, capped_ratio, pi - mu, divergence, outward)
    reported = metrics.trust_region_metrics(tokens.advantages, log_ratio, mu, pi, divergence, weight)
    reported |= metrics.policy_metrics(log_ratio, ratio, policy.entropy)
    return TokenUpdate(
        coefficient=weight * capped_ratio * tokens.advantages,
        weight=weight,
        divergence=divergence,
        metrics=reported,
        extrema=metrics.extrema_of(tokens.advantages, ratio, pi - mu, divergence),
        divergence_histogram=metrics.divergence_histogram(tokens.advantages, divergence),
    )


def _divergence(config: DPPOConfig, tokens: TokenBatch, policy: PolicyStats) -> torch.Tensor:
    partition, kind = config.divergence.split("_")
    if partition == "binary":
        binary = divergences.binary_tv if kind == "tv" else divergences.binary_kl
        return binary(tokens.rollout_log_probs, policy.log_prob)
    known = _known_tokens(tokens, policy)
    return divergences.topk_tv(known) if kind == "tv" else divergences.topk_kl(known)


def _outward(config: DPPOConfig, tokens: TokenBatch, policy: PolicyStats, vocab_size: int) -> torch.Tensor:
    log_mu, log_pi = tokens.rollout_log_probs, policy.log_prob
    if config.direction == "ratio":
        return ratio_direction(tokens.advantages, log_pi - log_mu)
    known = _known_tokens(tokens, policy)
    return predictive_direction(
        tokens.advantages, log_mu, log_pi, known, policy.collision, vocab_size, config.predictive_estimator
    )


def _known_tokens(tokens: TokenBatch, policy: PolicyStats) -> divergences.KnownTokens:
    assert policy.topk_log_prob is not None
    return divergences.known_tokens(
        tokens.rollout_log_probs,
        policy.log_prob,
        tokens.target,
        tokens.topk_ids,
        tokens.topk_log_probs,
        policy.topk_log_prob,
    )
