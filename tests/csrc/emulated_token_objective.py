"""The emulated token-objective kernel against float64: every divergence, direction and trust region, and every total."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from emulation_library import TokenObjectiveArguments, address

K, VOCAB, BINS, NUM_TOTALS, NO_ID = 3, 50, 320, 32, -100
DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl", "given")
DIRECTIONS = ("ratio", "exact_collision", "aggregated_tail", "uniform_tail")
TRUST_REGIONS = ("mask", "smooth", "ppo_clip", "cispo", "none")
# Together they take every branch; all 100 combinations would only take them again.
COMBINATIONS = [(d, DIRECTIONS[i % 4], TRUST_REGIONS[i % 5]) for i, d in enumerate(DIVERGENCES)]
WITHOUT_TOPK = [("topk_kl", "aggregated_tail", "smooth")]  # nothing but the sampled token is known
COMBINATIONS += [("topk_kl", "uniform_tail", "mask"), ("binary_tv", "exact_collision", "smooth"), *WITHOUT_TOPK]
LOW, HIGH, CAP, EDGES = 0.05, 0.1, 1.7, (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
# Remaining masses are at least 0.03 here and off by at most (K + 2) 2^-23; a KL divides by them and takes the logarithm.
TOLERANCE = 2.0**-23 * (K + 2) * (1 / 0.03 + 5)


def token_objective_failures(emulated: Any, n: int) -> Iterator[str]:
    """n tokens of policies that the engine's top K and the sampled token (in it or not) describe."""
    random = np.random.default_rng(2)
    mu_V = np.exp(random.normal(0, 1.5, (n, VOCAB)))
    pi_V = mu_V * np.exp(random.normal(0, 0.7, (n, VOCAB)))
    mu_V, pi_V = mu_V / mu_V.sum(1, keepdims=True), pi_V / pi_V.sum(1, keepdims=True)
    target = random.integers(0, VOCAB, n)
    ids = np.argsort(-mu_V, axis=1)[:, :K].copy()
    target[::2] = ids[::2, 1]
    inputs = {
        "log_mu": np.log(mu_V[np.arange(n), target]).astype(np.float32),
        "log_pi": np.log(pi_V[np.arange(n), target]).astype(np.float32),
        "advantage": (random.normal(0, 1, n) * (random.random(n) < 0.9)).astype(np.float32),
        "entropy": random.random(n).astype(np.float32),
        "collision": (pi_V**2).sum(1).astype(np.float32),
        "target": target,
        "topk_ids": ids,
        "topk_log_mu": np.log(np.take_along_axis(mu_V, ids, 1)).astype(np.float32),
        "topk_log_pi": np.log(np.take_along_axis(pi_V, ids, 1)).astype(np.float32),
        "given_divergence": random.random(n).astype(np.float32) * 0.2,
    }
    mask = np.arange(n) % 3 != 1
    masked = {name: values.copy() for name, values in inputs.items()}
    for values in masked.values():
        values[~mask] = NO_ID if values.dtype == np.int64 else np.nan
    for i, combination in enumerate(COMBINATIONS):
        given_mask = mask if i % 2 else None
        given, inside = (inputs, np.full(n, True)) if given_mask is None else (masked, mask)
        topk = 0 if combination in WITHOUT_TOPK else K
        addresses = {name: address(values) for name, values in given.items()}
        if topk == 0:
            addresses |= dict.fromkeys(("topk_ids", "topk_log_mu", "topk_log_pi"))
        addresses = {**dict(list(addresses.items())[:6]), "mask": address(given_mask), **addresses}
        floats = {name: np.full(n, np.nan, np.float32) for name in ("coefficient", "weight", "divergence")}
        totals, histogram = np.full(NUM_TOTALS, np.nan), np.full(BINS + 2, -1, np.int64)
        limits = (LOW, HIGH, CAP, math.log(0.8), math.log(1.28), math.log(3.0), 0.5, 1.5)
        kinds = (DIVERGENCES.index(combination[0]), DIRECTIONS.index(combination[1]))
        arguments = TokenObjectiveArguments(
            *(n, topk, VOCAB, *addresses.values(), *kinds, TRUST_REGIONS.index(combination[2]), *limits),
            *map(address, (*floats.values(), totals, histogram)),
        )
        assert ctypes.sizeof(arguments) % 8 == 0
        emulated.token_objective(arguments, 1)
        known = {name: x[inside, :topk] if x.ndim == 2 else x[inside] for name, x in inputs.items()}
        expected = reference(*combination, {name: x.astype(np.float64) for name, x in known.items()})
        if any((values[~inside] != 0).any() for values in floats.values()):
            yield f"{combination}, {n} tokens: the results of a masked token are not 0"
        results = {**{name: x[inside] for name, x in floats.items()}, "totals": totals, "histogram": histogram}
        # Of the divergences as returned: of those in float64 one may lie on the other side of a bin's edge.
        moved = inputs["advantage"][inside] != 0
        expected["histogram"] = histogram_of(results["divergence"][moved].astype(np.float64))
        for name, value in expected.items():
            with np.errstate(invalid="ignore"):  # -inf - -inf, which the comparison before it takes care of
                error = np.where(results[name] == value, 0.0, np.abs(results[name] - value))
            if not (error <= TOLERANCE * max(1, n if name == "totals" else 1)).all():
                yield f"{combination}, {n} tokens: {name} is off by {error.max(initial=0.0):.1e}"


def reference(divergence: str, direction: str, trust_region: str, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the kernel must return, from the papers' formulas."""
    mu, pi, advantage = np.exp(x["log_mu"]), np.exp(x["log_pi"]), x["advantage"]
    ratio = pi / mu
    new = (x["topk_ids"] != x["target"][:, None]).all(1)  # the sampled token is not in the top K
    slots_mu = np.concatenate([np.exp(x["topk_log_mu"]), (mu * new)[:, None]], 1)
    slots_pi = np.concatenate([np.exp(x["topk_log_pi"]), (pi * new)[:, None]], 1)
    mu_rest, pi_rest = 1 - slots_mu.sum(1), 1 - slots_pi.sum(1)

    def distance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        if divergence.endswith("tv"):
            return 0.5 * np.abs(p - q).sum(1)
        return (p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1))).sum(1)

    if divergence == "given":
        d = x["given_divergence"]
    elif divergence.startswith("binary"):
        d = distance(np.stack([mu, 1 - mu], 1), np.stack([pi, 1 - pi], 1))
    else:
        d = distance(np.column_stack([slots_mu, mu_rest]), np.column_stack([slots_pi, pi_rest]))

    square = pi_rest**2
    if direction == "uniform_tail":
        square = square / (VOCAB - x["topk_ids"].shape[1] - new)
    elif direction == "exact_collision":
        square = np.minimum(np.maximum(x["collision"] - (slots_pi**2).sum(1), 0), square)
    growth = pi - mu + (slots_pi * slots_mu).sum(1) + mu_rest / pi_rest * square - (slots_pi**2).sum(1) - square
    outward = np.sign(advantage) * np.sign(pi - mu if direction == "ratio" else growth)
    capped = np.minimum(ratio, CAP)
    delta = np.where(advantage > 0, HIGH, LOW)

    def clips(low: float, high: float) -> np.ndarray:
        return ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))

    weight = {
        "mask": 1.0 - ((outward > 0) & (d > delta)),
        "smooth": 1 - outward * np.abs(pi - mu) / delta,
        "ppo_clip": 1.0 - (clips(0.8, 1.28) | ((advantage < 0) & (ratio > 3))),
        "cispo": np.clip(capped, 0.5, 1.5) / capped,
        "none": np.ones_like(mu),
    }[trust_region]

    moved, masked, reference_clips = advantage != 0, weight == 0, clips(0.8, 1.2)
    bins = [moved & (mu >= low) & ((mu < high) | (high == 1)) for low, high in itertools.pairwise(EDGES)]
    groups = [moved, advantage > 0, advantage < 0, *bins]
    sums = [len(mu), *(group.sum() for group in groups), *((group & masked).sum() for group in groups)]
    bad = (advantage < 0) & (mu - pi >= 0.5)
    agrees = reference_clips == masked
    sums += [(moved * value).sum() for value in (reference_clips, agrees, bad, weight, d)]
    log_ratio = x["log_pi"] - x["log_mu"]
    per_token = (np.abs(log_ratio), -log_ratio, np.expm1(log_ratio) - log_ratio, ratio, ratio**2, x["entropy"])
    sums += [value.sum() for value in per_token]
    sums += [value.max(initial=-np.inf) for value in (d[moved], ratio, -ratio, np.abs(pi - mu))]
    return {
        "coefficient": weight * capped * advantage,
        "weight": weight,
        "divergence": d,
        "totals": np.array(sums, np.float64),
    }


def histogram_of(d: np.ndarray) -> np.ndarray:
    at = np.clip(np.floor((np.log10(np.maximum(d, 1e-30)) + 6) * 40) + 1, 0, BINS + 1).astype(int)
    return np.bincount(at, minlength=BINS + 2)
