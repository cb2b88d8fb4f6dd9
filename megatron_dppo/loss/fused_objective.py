"""``loss/objective.py`` as one operator, metrics included: the tokens are read once and one kernel is launched."""

from __future__ import annotations

import itertools
import math

import torch

from megatron_dppo.loss import metrics
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.inputs import TokenBatch
from megatron_dppo.loss.objective import TokenUpdate
from megatron_dppo.ops.policy_stats import PolicyStats

_MU_BINS = tuple(f"mu_{low:g}_{high:g}" for low, high in itertools.pairwise(metrics.ROLLOUT_PROBABILITY_BINS))
# Metric: (name of its numerator among _C.total_names, name of the count that it is divided by).
_MEANS = {
    "dppo/mask_fraction": ("masked", "moved"),
    "dppo/mask_fraction_pos": ("masked_positive", "positive"),
    "dppo/mask_fraction_neg": ("masked_negative", "negative"),
    **{
        f"dppo/mask_fraction_{mu_bin}": (f"masked_in_bin_{i}", f"moved_in_bin_{i}") for i, mu_bin in enumerate(_MU_BINS)
    },
    "dppo/weight_mean": ("weight_sum", "moved"),
    "dppo/divergence_mean": ("divergence_sum", "moved"),
    "dppo/ppo_would_clip_fraction": ("ppo_clipped", "moved"),
    "dppo/ppo_agreement": ("ppo_agreeing", "moved"),
    "dppo/bad_update_fraction": ("bad_updates", "moved"),
    "mismatch/abs_log_ratio": ("abs_log_ratio_sum", "tokens"),
    "mismatch/kl_k1": ("kl_k1_sum", "tokens"),
    "mismatch/kl_k3": ("kl_k3_sum", "tokens"),
    "mismatch/ratio_mean": ("ratio_sum", "tokens"),
    "mismatch/ratio_squared_mean": ("ratio_squared_sum", "tokens"),
    "entropy": ("entropy_sum", "tokens"),
}
_EXTREMA = ("divergence_max", "ratio_max", "negated_ratio_max", "prob_change_max")  # as metrics.EXTREMA


def fused_token_update(
    config: DPPOConfig,
    tokens: TokenBatch,
    policy: PolicyStats,
    exact_divergence: torch.Tensor | None,
    vocab_size: int,
) -> TokenUpdate:
    """See token_update; for fp32 tensors, where the compiled kernels are in use."""
    import megatron_dppo._C as _C

    delta_low, delta_high = config.thresholds
    limits = {name: getattr(config, name) for name in _C.limit_names}
    limits |= {"delta_low": delta_low, "delta_high": delta_high}
    coefficient, weight, divergence, totals, histogram = torch.ops.megatron_dppo.token_objective(
        tokens.rollout_log_probs,
        policy.log_prob,
        tokens.advantages,
        policy.entropy,
        policy.collision,
        tokens.target,
        None,
        tokens.topk_ids,
        tokens.topk_log_probs,
        policy.topk_log_prob,
        exact_divergence,
        vocab_size,
        divergence=config.divergence if exact_divergence is None else "given",
        direction=config.predictive_estimator if config.direction == "predictive" else config.direction,
        trust_region=config.trust_region,
        limits=[math.inf if limits[name] is None else float(limits[name]) for name in _C.limit_names],
    )
    numbers = dict(zip(_C.total_names, totals.unbind(), strict=True))
    return TokenUpdate(
        coefficient=coefficient,
        weight=weight,
        divergence=divergence,
        metrics={name: (numbers[sum_], numbers[count]) for name, (sum_, count) in _MEANS.items()},
        extrema={name: numbers[total] for name, total in zip(metrics.EXTREMA, _EXTREMA, strict=True)},
        divergence_histogram=histogram,
    )
