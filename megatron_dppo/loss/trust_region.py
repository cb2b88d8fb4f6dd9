"""The weight of every token's update: whatever the trust region, the gradient is ``weight * ratio * A * grad(log pi)``."""

from __future__ import annotations

import math

import torch

from megatron_dppo.loss.config import DPPOConfig


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
