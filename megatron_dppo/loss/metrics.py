"""What a trust-region user watches, in a form that can be reduced over ranks and micro-batches before it is read.

Three kinds of numbers: means as ``(numerator, denominator)``, to be summed; extrema, to be max-reduced (a minimum
travels negated); and a histogram of the divergence, to be summed, from which the 99th percentile is read.
``finalize_metrics`` turns the reduced ones into what is logged.

``dppo/*`` count tokens with A != 0 only: the others have no update that a trust region could hold back. ``mismatch/*``
and ``entropy`` count every token of the mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch

from megatron_dppo.loss.trust_region import ppo_clips

Metrics = dict[str, tuple[torch.Tensor, torch.Tensor]]

HISTOGRAM_BINS_PER_DECADE = 40  # a bin is 5.9 % wide: a percentile, read at its middle, is within 3 %
HISTOGRAM_LOWEST, HISTOGRAM_HIGHEST = -6, 2  # powers of ten; one bin more at either end for what lies outside
HISTOGRAM_BINS = HISTOGRAM_BINS_PER_DECADE * (HISTOGRAM_HIGHEST - HISTOGRAM_LOWEST)

BAD_UPDATE_DROP = 0.5  # 2602.04879: updates with A < 0 and mu - pi >= 0.5 suffice to destabilise training
PPO_REFERENCE_CLIP = 0.2
ROLLOUT_PROBABILITY_BINS = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
_NEGATED = "_negated"
EXTREMA = (
    "dppo/divergence_max",
    "mismatch/ratio_max",
    "mismatch/ratio_min" + _NEGATED,
    "mismatch/prob_change_max",
)


def trust_region_metrics(
    advantages: torch.Tensor,
    log_ratio: torch.Tensor,
    mu: torch.Tensor,
    pi: torch.Tensor,
    divergence: torch.Tensor,
    weight: torch.Tensor,
) -> Metrics:
    """``dppo/*`` from [n] vectors; a token counts as masked if its weight is 0."""
    moved, masked = advantages != 0, weight == 0
    clipped = ppo_clips(advantages, log_ratio, PPO_REFERENCE_CLIP, PPO_REFERENCE_CLIP)
    metrics = {
        "dppo/mask_fraction": _mean(masked, moved),
        "dppo/mask_fraction_pos": _mean(masked, advantages > 0),
        "dppo/mask_fraction_neg": _mean(masked, advantages < 0),
        "dppo/weight_mean": _mean(weight, moved),
        "dppo/divergence_mean": _mean(divergence, moved),
        "dppo/ppo_would_clip_fraction": _mean(clipped, moved),
        "dppo/ppo_agreement": _mean(clipped == masked, moved),
        "dppo/bad_update_fraction": _mean((advantages < 0) & (mu - pi >= BAD_UPDATE_DROP), moved),
    }
    for low, high in itertools.pairwise(ROLLOUT_PROBABILITY_BINS):
        inside = (mu >= low) & ((mu < high) | (high == 1.0))
        metrics[f"dppo/mask_fraction_mu_{low:g}_{high:g}"] = _mean(masked, moved & inside)
    return metrics


def policy_metrics(log_ratio: torch.Tensor, ratio: torch.Tensor, entropy: torch.Tensor) -> Metrics:
    """The policy's ``entropy``, and ``mismatch/*``, how it differs from the rollout policy.

    Before a step's first update the mismatch is the engines' disagreement.
    """
    every = torch.ones_like(log_ratio, dtype=torch.bool)
    # r - 1 - log r is a second-order quantity: in fp32 it would drown in the rounding of r, and could come out negative.
    exact_log_ratio = log_ratio.double()
    return {
        "mismatch/abs_log_ratio": _mean(log_ratio.abs(), every),
        "mismatch/kl_k1": _mean(-log_ratio, every),
        "mismatch/kl_k3": _mean(exact_log_ratio.expm1() - exact_log_ratio, every),
        "mismatch/ratio_mean": _mean(ratio, every),
        "mismatch/ratio_squared_mean": _mean(ratio.square(), every),
        "entropy": _mean(entropy, every),
    }


def mean_metric(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and number of [n] values."""
    return _mean(values, torch.ones_like(values, dtype=torch.bool))


def extrema_of(
    advantages: torch.Tensor, ratio: torch.Tensor, probability_change: torch.Tensor, divergence: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Scalars to be max-reduced; -inf where there is nothing."""
    extrema = (
        _max(divergence[advantages != 0]),
        _max(ratio),
        _max(-ratio),
        _max(probability_change.abs()),
    )
    return dict(zip(EXTREMA, extrema, strict=True))


def divergence_histogram(advantages: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
    """[bins + 2] int64 counts of log10(D) over tokens with A != 0; first and last bin take what lies outside."""
    exponent = divergence[advantages != 0].double().log10()
    at = ((exponent - HISTOGRAM_LOWEST) * HISTOGRAM_BINS_PER_DECADE).floor() + 1
    # NaN cannot come out of a divergence of finite logits; should it come in, it belongs with the largest.
    at = at.nan_to_num(nan=HISTOGRAM_BINS + 1).clamp(0, HISTOGRAM_BINS + 1).long()
    return torch.zeros(HISTOGRAM_BINS + 2, dtype=torch.int64, device=at.device).scatter_add_(0, at, torch.ones_like(at))


def finalize_metrics(
    metrics: Mapping[str, Sequence[torch.Tensor] | torch.Tensor],
    extrema: Mapping[str, torch.Tensor],
    histogram: torch.Tensor,
) -> dict[str, float]:
    """Reduced numbers -> what is logged.

    Args:
        metrics: {name: (numerator, denominator) or [2] tensor}, summed over ranks and micro-batches.
        extrema: {name: scalar}, max-reduced.
        histogram: summed.

    Returns:
        {name: float}. A mean over no tokens is left out. ``dppo/divergence_p99`` is within 3 % for D between 1e-6 and
        100 and never above ``dppo/divergence_max``. ``mismatch/effective_sample_size`` is (sum r)^2 / (n sum r^2), in
        (0, 1].
    """
    final = {}
    for name, pair in metrics.items():
        numerator, denominator = float(pair[0]), float(pair[1])
        if denominator > 0:
            final[name] = numerator / denominator
    squared_mean = final.pop("mismatch/ratio_squared_mean", None)
    if squared_mean is not None:
        final["mismatch/effective_sample_size"] = final["mismatch/ratio_mean"] ** 2 / squared_mean
    for name, value in extrema.items():
        if float(value) != -math.inf:
            negated = name.endswith(_NEGATED)
            final[name.removesuffix(_NEGATED)] = -float(value) if negated else float(value)
    if "dppo/divergence_max" in final:
        final["dppo/divergence_p99"] = min(_percentile(histogram, 0.99), final["dppo/divergence_max"])
    return final


def _percentile(histogram: torch.Tensor, fraction: float) -> float:
    cumulative = histogram.cumsum(0)
    at = int(torch.searchsorted(cumulative, math.ceil(fraction * int(cumulative[-1]))))
    if at == 0:
        return 0.0
    if at > HISTOGRAM_BINS:
        return math.inf
    return 10.0 ** (HISTOGRAM_LOWEST + (at - 0.5) / HISTOGRAM_BINS_PER_DECADE)


def _mean(values: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # fp64: sums over many ranks must not lose counts above 2^24.
    numerator = values.to(torch.float64).masked_fill(~where, 0.0).sum()
    return numerator, where.sum().to(torch.float64)


def _max(values: torch.Tensor) -> torch.Tensor:
    floor = values.new_full((1,), -torch.inf)
    return torch.cat([values, floor]).max().to(torch.float64)
