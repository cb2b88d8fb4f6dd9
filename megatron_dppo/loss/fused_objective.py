"""``loss/objective.py`` as one operator, metrics included: the tokens are read once and one kernel is launched.

The kernel and this file agree by name: ``_C.limit_names`` says which thresholds it takes, ``_C.total_names`` what it adds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from megatron_dppo.loss import metrics
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.inputs import FlatTokens
from megatron_dppo.loss.metrics import MetricSums
from megatron_dppo.loss.objective import TokenObjective, token_objective
from megatron_dppo.ops.backend import Backend
from megatron_dppo.ops.policy_stats import PolicyStats

Objective = Callable[[DPPOConfig, FlatTokens, PolicyStats, "torch.Tensor | None", int], TokenObjective]

# metric -> (numerator, denominator), by the kernel's names for its totals
_MEANS = {
    "dppo/mask_fraction": ("masked", "moved"),
    "dppo/mask_fraction_pos": ("masked_positive", "positive"),
    "dppo/mask_fraction_neg": ("masked_negative", "negative"),
    **{name: (f"masked_in_bin_{i}", f"moved_in_bin_{i}") for i, name in enumerate(metrics.MASK_FRACTION_OF_BIN)},
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
_MAXIMA = dict(
    zip(metrics.MAXIMA, ("divergence_max", "ratio_max", "negated_ratio_max", "prob_change_max"), strict=True)
)


def objective_of(backend: Backend) -> Objective:
    """The function that decides about tokens: one kernel where there is one, else its definition."""
    if backend.operators is None:
        return token_objective
    return partial(fused_token_objective, backend.operators)


def fused_token_objective(
    operators: Any,
    config: DPPOConfig,
    tokens: FlatTokens,
    policy: PolicyStats,
    exact_divergence: torch.Tensor | None,
    vocab_size: int,
) -> TokenObjective:
    """See token_objective; for fp32 tensors, by the operator of a compiled backend (``Backend.operators``)."""
    topk = (tokens.topk_ids, tokens.topk_log_probs, policy.topk_log_prob)
    coefficient, weight, divergence, totals, histogram = operators.token_objective(
        tokens.rollout_log_probs,
        policy.log_prob,
        tokens.advantages,
        policy.entropy,
        policy.collision,
        tokens.target,
        tokens.mask,
        *(topk if policy.topk_log_prob is not None else (None, None, None)),
        exact_divergence,
        vocab_size,
        divergence=config.divergence if exact_divergence is None else "given",
        direction=config.predictive_estimator if config.direction == "predictive" else config.direction,
        trust_region=config.trust_region,
        limits=_limits(config),
    )
    means, maxima = _arranged(totals)
    return TokenObjective(
        coefficient=coefficient,
        weight=weight,
        divergence=divergence,
        metrics=MetricSums(
            mean_names=tuple(_MEANS),
            means=means,
            maximum_names=metrics.MAXIMA,
            maxima=maxima,
            histogram=histogram,
        ),
    )


def _limits(config: DPPOConfig) -> list[float]:
    """The thresholds in the kernel's order."""
    import megatron_dppo._C as _C  # only where the kernels are in use

    delta_low, delta_high = config.thresholds
    values = {
        "delta_low": delta_low,
        "delta_high": delta_high,
        "ratio_cap": math.inf if config.ratio_cap is None else config.ratio_cap,
        "ppo_clip_low": config.ppo_clip_low,
        "ppo_clip_high": config.ppo_clip_high,
        "ppo_dual_clip": math.inf if config.ppo_dual_clip is None else config.ppo_dual_clip,
        "cispo_ratio_min": config.cispo_ratio_min,
        "cispo_ratio_max": config.cispo_ratio_max,
    }
    return [values[name] for name in _C.limit_names]


def _arranged(totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, 2] numerators and denominators and [E] maxima of the kernel's totals.

    Picked one by one: a tensor of places would have to be kept for the next call, and one that was made while torch.export
    looks on has no values. And no views: what leaves a part of a captured graph must be memory of its own.
    """
    at, of = _places_of_totals(), totals.unbind()
    pairs = torch.stack([of[at[total]] for pair in _MEANS.values() for total in pair])
    return pairs.view(-1, 2).clone(), torch.stack([of[at[_MAXIMA[name]]] for name in metrics.MAXIMA])


@cache
def _places_of_totals() -> dict[str, int]:
    """{name: where the kernel's totals hold it}; refuses a kernel of other metrics."""
    import megatron_dppo._C as _C

    constants = {
        "reference_clip": metrics.PPO_REFERENCE_CLIP,
        "bad_update_drop": metrics.BAD_UPDATE_DROP,
        "probability_bins": metrics.ROLLOUT_PROBABILITY_BINS,
        "histogram_lowest": metrics.HISTOGRAM_LOWEST,
        "histogram_highest": metrics.HISTOGRAM_HIGHEST,
        "histogram_bins_per_decade": metrics.HISTOGRAM_BINS_PER_DECADE,
    }
    for name, value in constants.items():
        if _C.metric_constants[name] != value:
            raise RuntimeError(
                f"megatron_dppo._C has {name}={_C.metric_constants[name]}, loss/metrics.py with {value}: "
                "it was built from other sources, build it again"
            )
    return {name: place for place, name in enumerate(_C.total_names)}
