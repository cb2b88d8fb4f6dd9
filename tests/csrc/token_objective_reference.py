"""What the token objective must be, in float64 numpy, from the papers' formulas; for the CPU and the emulated CUDA kernel.

The inputs are what the kernel gets, in float32. Where a formula has no finite value, the floors are those of
megatron_dppo/ops/probability.py in single precision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

LOG_ZERO = -1e5
TINY, EPSILON = 2.0**-126, 2.0**-23
EDGES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
HISTOGRAM_BINS = 320
MAXIMA = ("divergence_max", "ratio_max", "negated_ratio_max", "prob_change_max", "update_max")
# The kernel's means, in its order: (numerator, denominator)
MEANS = {
    "mask_fraction": ("masked", "moved"),
    "mask_fraction_pos": ("masked_positive", "positive"),
    "mask_fraction_neg": ("masked_negative", "negative"),
    **{f"mask_fraction_of_bin_{i}": (f"masked_in_bin_{i}", f"moved_in_bin_{i}") for i in range(5)},
    "weight_mean": ("weight", "moved"),
    "divergence_mean": ("divergence", "moved"),
    "ppo_would_clip_fraction": ("ppo_clipped", "moved"),
    "ppo_agreement": ("ppo_agreeing", "moved"),
    "bad_update_fraction": ("bad_updates", "moved"),
    "abs_log_ratio": ("abs_log_ratio", "tokens"),
    "kl_k1": ("k1", "tokens"),
    "kl_k3": ("k3", "tokens"),
    "ratio_mean": ("ratio", "tokens"),
    "ratio_squared_mean": ("ratio_squared", "tokens"),
    "entropy": ("entropy", "tokens"),
    "update_mean": ("update", "tokens"),
    "loss": ("loss", "tokens"),
}


def known_tokens(x: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n, K + 1] log-probs of the top K and the sampled token under mu and pi, and which slots count."""
    new = (x["topk_ids"] != x["target"][:, None]).all(1)  # the sampled token is not in the top K
    valid = np.concatenate([np.full(x["topk_ids"].shape, True), new[:, None]], 1)
    log_mu = np.concatenate([x["topk_log_mu"], x["log_mu"][:, None]], 1).astype(np.float64)
    log_pi = np.concatenate([x["topk_log_pi"], x["log_pi"][:, None]], 1).astype(np.float64)
    return log_mu, log_pi, valid


def remaining_mass(log_p: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[n] what [n, S] log-probs leave over; never less than the rounding of all but the largest."""
    log_p = np.where(valid, log_p, -np.inf)
    largest = log_p.max(1)
    others = np.exp(log_p).sum(1) - np.exp(largest)
    return np.maximum(-np.expm1(largest) - others, EPSILON * others)


def log1mexp(log_p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(-np.expm1(log_p)), math.log(TINY))


def divergence_of(x: Mapping[str, np.ndarray], divergence: str) -> np.ndarray:
    if divergence == "given":
        return x["given_divergence"].astype(np.float64)
    if divergence.startswith("binary"):
        log_mu, log_pi = x["log_mu"].astype(np.float64), x["log_pi"].astype(np.float64)
        if divergence == "binary_tv":
            return np.abs(np.exp(log_mu) - np.exp(log_pi))
        other = -np.expm1(log_mu) * (log1mexp(log_mu) - log1mexp(log_pi))
        return np.maximum(np.exp(log_mu) * (log_mu - np.maximum(log_pi, LOG_ZERO)) + other, 0)
    log_mu, log_pi, valid = known_tokens(x)
    mu, pi = np.exp(log_mu) * valid, np.exp(log_pi) * valid
    mu_rest, pi_rest = remaining_mass(log_mu, valid), remaining_mass(log_pi, valid)
    if divergence == "topk_tv":
        return 0.5 * (np.abs(mu - pi).sum(1) + np.abs(mu_rest - pi_rest))
    slots = mu * (np.maximum(log_mu, LOG_ZERO) - np.maximum(log_pi, LOG_ZERO))
    rest = mu_rest * (np.log(np.maximum(mu_rest, TINY)) - np.log(np.maximum(pi_rest, TINY)))
    return np.maximum(slots.sum(1) + rest, 0)


def growth_of(x: Mapping[str, np.ndarray], direction: str, vocab_size: int) -> np.ndarray:
    """[n] change of KL(mu || pi) where A > 0, to first order; only its sign counts."""
    if direction == "ratio":
        return x["log_pi"] - x["log_mu"]
    log_mu, log_pi, valid = known_tokens(x)
    mu, pi = np.exp(log_mu) * valid, np.exp(log_pi) * valid
    mu_rest, pi_rest = remaining_mass(log_mu, valid), remaining_mass(log_pi, valid)
    square = pi_rest**2
    if direction == "uniform_tail":
        square = square / np.maximum(vocab_size - valid.sum(1), 1)
    elif direction == "exact_collision":
        square = np.minimum(np.maximum(x["collision"] - (pi**2).sum(1), 0), square)
    cross = (pi * mu).sum(1) + mu_rest / np.maximum(pi_rest, TINY) * square
    sampled = np.exp(x["log_pi"].astype(np.float64)) - np.exp(x["log_mu"].astype(np.float64))
    return sampled + cross - (pi**2).sum(1) - square


def clips(advantage: np.ndarray, log_ratio: np.ndarray, low: float, high: float) -> np.ndarray:
    """Whose gradient PPO drops; compared in single precision, as the kernel does."""
    above, below = log_ratio > np.float32(math.log1p(high)), log_ratio < np.float32(math.log1p(-low))
    return ((advantage > 0) & above) | ((advantage < 0) & below)


def objective(
    x: Mapping[str, np.ndarray],
    divergence: str,
    direction: str,
    trust_region: str,
    limits: Mapping[str, float],
    vocab_size: int,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """[n] coefficient, weight and divergence; and of all tokens: means [M, 2], maxima [E], loss and the number of tokens."""
    advantage = x["advantage"].astype(np.float64)
    log_ratio = x["log_pi"] - x["log_mu"]  # in single precision
    mu, pi = np.exp(x["log_mu"].astype(np.float64)), np.exp(x["log_pi"].astype(np.float64))
    ratio = np.exp(np.clip(log_ratio, -20, 20).astype(np.float64))
    capped = np.minimum(ratio, limits["ratio_cap"])
    d = divergence_of(x, divergence)
    outward = np.ones_like(advantage)
    if direction != "symmetric":
        outward = np.sign(advantage) * np.sign(growth_of(x, direction, vocab_size))
    delta = np.where(advantage > 0, limits["delta_high"], limits["delta_low"])
    dual = np.float32(math.log(limits["ppo_dual_clip"]))
    weight = {
        "mask": lambda: 1.0 - ((outward > 0) & (d > delta)),
        "smooth": lambda: 1 - outward * np.abs(pi - mu) / delta,
        "ppo_clip": lambda: (
            1.0
            - (
                clips(advantage, log_ratio, limits["ppo_clip_low"], limits["ppo_clip_high"])
                | ((advantage < 0) & (log_ratio > dual))
            )
        ),
        "cispo": lambda: np.clip(capped, limits["cispo_ratio_min"], limits["cispo_ratio_max"]) / capped,
        "none": lambda: np.ones_like(mu),
    }[trust_region]()

    moved, masked = advantage != 0, weight == 0
    reference_clips = clips(advantage, log_ratio, 0.2, 0.2)
    counts = {
        "tokens": np.full(len(mu), True),
        "moved": moved,
        "positive": advantage > 0,
        "negative": advantage < 0,
        "masked": moved & masked,
        "masked_positive": (advantage > 0) & masked,
        "masked_negative": (advantage < 0) & masked,
        "ppo_clipped": moved & reference_clips,
        "ppo_agreeing": moved & (reference_clips == masked),
        "bad_updates": (advantage < 0) & (mu - pi >= 0.5),
    }
    for i, (low, high) in enumerate(itertools.pairwise(EDGES)):
        counts[f"moved_in_bin_{i}"] = moved & (mu >= low) & ((mu < high) | (high == 1))
        counts[f"masked_in_bin_{i}"] = counts[f"moved_in_bin_{i}"] & masked
    wide = log_ratio.astype(np.float64)
    coefficient = weight * capped * advantage
    sums = {
        "weight": weight[moved],
        "divergence": d[moved],
        "abs_log_ratio": np.abs(wide),
        "k1": -wide,
        "k3": np.expm1(wide) - wide,
        "ratio": ratio,
        "ratio_squared": ratio**2,
        "entropy": x["entropy"].astype(np.float64),
        "update": np.abs(coefficient),
        "loss": -coefficient,
    }
    totals = {name: float(values.sum()) for name, values in (counts | sums).items()}
    of_all = {
        "means": [[totals[name] for name in pair] for pair in MEANS.values()],
        "maxima": [x.max(initial=-np.inf) for x in (d[moved], ratio, -ratio, np.abs(pi - mu), np.abs(coefficient))],
        "loss": totals["loss"],
        "tokens": len(mu),
    }
    return {"coefficient": coefficient, "weight": weight, "divergence": d}, of_all


def histogram_of(d: np.ndarray) -> np.ndarray:
    """Counts of log10(D)."""
    at = np.clip(np.floor((np.log10(np.maximum(d, 1e-30)) + 6) * 40) + 1, 0, HISTOGRAM_BINS + 1).astype(int)
    return np.bincount(at, minlength=HISTOGRAM_BINS + 2)
