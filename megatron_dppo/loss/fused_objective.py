"""``loss/objective.py`` as one operator, metrics included: the tokens are read once and one kernel is launched.

The kernel and this file agree by name: ``_C.limit_names`` says which thresholds it takes, ``_C.mean_names`` and
``_C.maximum_names`` what it reports.
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

# the kernel's name -> the metric's, in the order of both
_MEANS = {
    "mask_fraction": "dppo/mask_fraction",
    "mask_fraction_pos": "dppo/mask_fraction_pos",
    "mask_fraction_neg": "dppo/mask_fraction_neg",
    **{f"mask_fraction_of_bin_{i}": name for i, name in enumerate(metrics.MASK_FRACTION_OF_BIN)},
    "weight_mean": "dppo/weight_mean",
    "divergence_mean": "dppo/divergence_mean",
    "ppo_would_clip_fraction": "dppo/ppo_would_clip_fraction",
    "ppo_agreement": "dppo/ppo_agreement",
    "bad_update_fraction": "dppo/bad_update_fraction",
    "abs_log_ratio": "mismatch/abs_log_ratio",
    "kl_k1": "mismatch/kl_k1",
    "kl_k3": "mismatch/kl_k3",
    "ratio_mean": "mismatch/ratio_mean",
    "ratio_squared_mean": "mismatch/ratio_squared_mean",
    "entropy": "entropy",
    "update_mean": "dppo/update_mean",
    "loss": metrics.LOSS,
}
_MAXIMA = ("divergence_max", "ratio_max", "negated_ratio_max", "prob_change_max", "update_max")


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
    _refuse_other_metrics()
    topk = (tokens.topk_ids, tokens.topk_log_probs, policy.topk_log_prob)
    coefficient, weight, divergence, means, maxima, histogram, loss, num_tokens = operators.token_objective(
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
        **rule_of(config, is_given=exact_divergence is not None),
    )
    return TokenObjective(
        coefficient=coefficient,
        weight=weight,
        divergence=divergence,
        loss=loss,
        num_tokens=num_tokens,
        metrics=MetricSums(
            mean_names=tuple(_MEANS.values()),
            means=means,
            maximum_names=metrics.MAXIMA,
            maxima=maxima,
            histogram=histogram,
        ),
    )


def rule_of(config: DPPOConfig, *, is_given: bool = False) -> dict[str, Any]:
    """What decides about a token, as the operators take it; ``is_given``: the divergence comes with the tokens."""
    return {
        "divergence": "given" if is_given else config.divergence,
        "direction": config.predictive_estimator if config.direction == "predictive" else config.direction,
        "trust_region": config.trust_region,
        "limits": _limits(config),
    }


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


@cache
def _refuse_other_metrics() -> None:
    """Raise RuntimeError if the kernel's metrics are not those of this package."""
    import megatron_dppo._C as _C

    here = {
        "mean_names": tuple(_MEANS),
        "maximum_names": _MAXIMA,
        "reference_clip": metrics.PPO_REFERENCE_CLIP,
        "bad_update_drop": metrics.BAD_UPDATE_DROP,
        "probability_bins": metrics.ROLLOUT_PROBABILITY_BINS,
        "histogram_lowest": metrics.HISTOGRAM_LOWEST,
        "histogram_highest": metrics.HISTOGRAM_HIGHEST,
        "histogram_bins_per_decade": metrics.HISTOGRAM_BINS_PER_DECADE,
    }
    built = {"mean_names": _C.mean_names, "maximum_names": _C.maximum_names, **_C.metric_constants}
    for name, value in here.items():
        if built[name] != value:
            raise RuntimeError(
                f"megatron_dppo._C has {name}={built[name]}, loss/metrics.py and loss/fused_objective.py have {value}: it "
                "was built from other sources, build it again"
            )
