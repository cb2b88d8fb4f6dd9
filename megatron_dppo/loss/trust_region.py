"""Which tokens' updates are held back, and how far: the direction of an update, and its weight.

Only an update that leads away from the rollout policy (outward) is held back. Whatever the trust region, the gradient is
``weight * ratio * A * grad(log pi)``.
"""

from __future__ import annotations

import math

import torch

from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.divergences import KnownTokens


def ratio_direction(advantages: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """Sign of A (log pi - log mu): +1 where the update moves the sampled token's ratio further from 1 (2602.04879)."""
    return torch.sign(advantages) * torch.sign(log_ratio)


def predictive_direction(
    advantages: torch.Tensor,
    log_mu: torch.Tensor,
    log_pi: torch.Tensor,
    tokens: KnownTokens,
    collision: torch.Tensor,
    vocab_size: int,
    estimator: str,
) -> torch.Tensor:
    """Sign of the change of KL(mu || pi) under the next policy-gradient step (2607.10848), +1 where it grows.

    A step along A * grad(log pi_k) changes the logits by A (e_k - pi) and KL(mu || pi), whose gradient is pi - mu, by
    A [(pi_k - mu_k) + sum_i pi_i (mu_i - pi_i)]. The sums run over the whole vocabulary, of which ``tokens`` are known;
    with m and q the mass that mu and pi leave to the rest, the estimators take for the rest's share

    * aggregated_tail: the rest is one token, so sum pi mu = q m and sum pi^2 = q^2;
    * uniform_tail: it is spread evenly, so both are divided by the number of other tokens;
    * exact_collision: sum pi^2 is exact, and mu is shaped like pi there, so sum pi mu = (m / q) sum pi^2 over the rest.
      Exact where only the known tokens differ.
    """
    known_cross = (tokens.pi * tokens.mu).sum(dim=1)
    known_square = tokens.pi.square().sum(dim=1)
    mu_other, pi_other = tokens.mu_other, tokens.pi_other
    if estimator == "exact_collision":
        other_square = (collision - known_square).clamp(min=0.0)
        tiny = torch.finfo(pi_other.dtype).tiny
        # sum of squares <= (sum)^2, so the quotient times the rest is at most m q: no blow-up where q is rounding
        # noise.
        other_square = torch.minimum(other_square, pi_other.square())
        other_cross = mu_other * (other_square / pi_other.clamp(min=tiny))
    else:
        other_tokens = (vocab_size - tokens.valid.sum(dim=1)).clamp(min=1)
        spread = other_tokens if estimator == "uniform_tail" else torch.ones_like(other_tokens)
        other_square = pi_other.square() / spread
        other_cross = pi_other * mu_other / spread
    change = (log_pi.exp() - log_mu.exp()) + (known_cross + other_cross) - (known_square + other_square)
    return torch.sign(advantages) * torch.sign(change)


def token_weight(
    config: DPPOConfig,
    advantages: torch.Tensor,
    log_ratio: torch.Tensor,
    ratio: torch.Tensor,
    probability_change: torch.Tensor,
    divergence: torch.Tensor,
    outward: torch.Tensor,
) -> torch.Tensor:
    """[n] weights.

    Args:
        config: which trust region, and its thresholds.
        advantages: [n].
        log_ratio: [n] log pi - log mu.
        ratio: [n] the ratio as it enters the gradient, i.e. capped if a cap is set.
        probability_change: [n] pi - mu of the sampled token.
        divergence: [n] D(mu || pi).
        outward: [n] +1 where the update leads away from the rollout policy, -1 where it leads back.
    """
    if config.trust_region == "none":
        return torch.ones_like(ratio)
    if config.trust_region == "cispo":
        return ratio.clamp(config.cispo_ratio_min, config.cispo_ratio_max) / ratio
    if config.trust_region == "ppo_clip":
        clipped = ppo_clips(advantages, log_ratio, config.ppo_clip_low, config.ppo_clip_high)
        if config.ppo_dual_clip is not None:
            clipped |= (advantages < 0) & (log_ratio > math.log(config.ppo_dual_clip))
        return 1.0 - clipped.to(ratio.dtype)
    delta_low, delta_high = config.thresholds
    delta = torch.where(advantages > 0, delta_high, delta_low).to(ratio.dtype)
    if config.trust_region == "smooth":
        # Derivative of r A - |A| / (2 delta) mu (r - 1)^2 (2606.09821): r A scaled by this.
        return 1.0 - outward * probability_change.abs() / delta
    return 1.0 - ((outward > 0) & (divergence > delta)).to(ratio.dtype)


def ppo_clips(advantages: torch.Tensor, log_ratio: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """[n] bool: tokens whose gradient PPO's clipped objective drops."""
    above, below = log_ratio > math.log1p(high), log_ratio < math.log1p(-low)
    return ((advantages > 0) & above) | ((advantages < 0) & below)
