"""``loss/objective.py`` as one operator, metrics included: the tokens are read once and one kernel is launched."""

from __future__ import annotations

import itertools

import torch

from megatron_dppo.loss import metrics
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.inputs import TokenBatch
from megatron_dppo.loss.objective import TokenUpdate
from megatron_dppo.ops.policy_stats import PolicyStats

_MU_BINS = tuple(f"mu_{low:g}_{high:g}" for low, high in itertools.pairwise(metrics.ROLLOUT_PROBABILITY_BINS))
# What the operator adds up, in its order (csrc/core/token_update_arguments.h, UpdateTotal): numbers of tokens, ...
_COUNTS = ("moved", "positive", "negative", *_MU_BINS)
# ... numerators and the count that each is divided by, ...
_NUMERATORS = {
    "dppo/mask_fraction": "moved",
    "dppo/mask_fraction_pos": "positive",
    "dppo/mask_fraction_neg": "negative",
    **{f"dppo/mask_fraction_{mu_bin}": mu_bin for mu_bin in _MU_BINS},
    "dppo/weight_mean": "moved",
    "dppo/divergence_mean": "moved",
    "dppo/ppo_would_clip_fraction": "moved",
    "dppo/ppo_agreement": "moved",
    "dppo/bad_update_fraction": "moved",
    "mismatch/abs_log_ratio": "tokens",
    "mismatch/kl_k1": "tokens",
    "mismatch/kl_k3": "tokens",
    "mismatch/ratio_mean": "tokens",
    "mismatch/ratio_squared_mean": "tokens",
    "entropy": "tokens",
}
# ... and, as maxima, metrics.EXTREMA.


def fused_token_update(
    config: DPPOConfig,
    tokens: TokenBatch,
    policy: PolicyStats,
    exact_divergence: torch.Tensor | None,
    vocab_size: int,
) -> TokenUpdate:
    """See token_update; for fp32 tensors, where the compiled kernels are in use."""
    delta_low, delta_high = config.thresholds
    coefficient, weight, divergence, totals, histogram = torch.ops.megatron_dppo.token_update(
        tokens.rollout_log_probs,
        policy.log_prob,
        tokens.advantages,
        policy.entropy,
        policy.collision,
        tokens.target,
        tokens.topk_ids,
        tokens.topk_log_probs,
        policy.topk_log_prob,
        exact_divergence,
        vocab_size,
        divergence=config.divergence if exact_divergence is None else "given",
        direction=config.predictive_estimator if config.direction == "predictive" else config.direction,
        trust_region=config.trust_region,
        delta_low=delta_low,
        delta_high=delta_high,
        ratio_cap=config.ratio_cap,
        ppo_clip_low=config.ppo_clip_low,
        ppo_clip_high=config.ppo_clip_high,
        ppo_dual_clip=config.ppo_dual_clip,
        cispo_ratio_min=config.cispo_ratio_min,
        cispo_ratio_max=config.cispo_ratio_max,
        reference_clip=metrics.PPO_REFERENCE_CLIP,
        bad_update_drop=metrics.BAD_UPDATE_DROP,
        probability_bins=metrics.ROLLOUT_PROBABILITY_BINS,
        histogram_lowest=metrics.HISTOGRAM_LOWEST,
        bins_per_decade=metrics.HISTOGRAM_BINS_PER_DECADE,
        histogram_bins=metrics.HISTOGRAM_BINS,
    )
    numbers = dict(zip((*_COUNTS, *_NUMERATORS, *metrics.EXTREMA), totals.unbind(), strict=True))
    numbers["tokens"] = totals.new_full((), weight.shape[0])
    return TokenUpdate(
        coefficient=coefficient,
        weight=weight,
        divergence=divergence,
        metrics={name: (numbers[name], numbers[count]) for name, count in _NUMERATORS.items()},
        extrema={name: numbers[name] for name in metrics.EXTREMA},
        divergence_histogram=histogram,
    )
