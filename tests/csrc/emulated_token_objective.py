"""The emulated token-objective kernel against float64: every divergence, direction and trust region, and every total."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from emulation_library import TokenObjectiveArguments, address
from token_objective_reference import HISTOGRAM_BINS, MAXIMA, MEANS, histogram_of, objective

K, VOCAB, NO_ID = 3, 50, -100
DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl", "given")
DIRECTIONS = ("ratio", "exact_collision", "aggregated_tail", "uniform_tail", "symmetric")
TRUST_REGIONS = ("mask", "smooth", "ppo_clip", "cispo", "none")
# Together they take every branch; all 100 combinations would only take them again.
COMBINATIONS = [(d, DIRECTIONS[i % 4], TRUST_REGIONS[i % 5]) for i, d in enumerate(DIVERGENCES)]
WITHOUT_TOPK = [("topk_kl", "aggregated_tail", "smooth")]  # nothing but the sampled token is known
COMBINATIONS += [
    ("topk_kl", "uniform_tail", "mask"),
    ("binary_tv", "exact_collision", "smooth"),
    ("binary_kl", "symmetric", "mask"),
    *WITHOUT_TOPK,
]
LIMITS = {
    "delta_low": 0.05,
    "delta_high": 0.1,
    "ratio_cap": 1.7,
    "ppo_clip_low": 0.2,
    "ppo_clip_high": 0.28,
    "ppo_dual_clip": 3.0,
    "cispo_ratio_min": 0.5,
    "cispo_ratio_max": 1.5,
}
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
        means, maxima = np.full((len(MEANS), 2), np.nan), np.full(len(MAXIMA), np.nan)
        histogram, tokens = np.full(HISTOGRAM_BINS + 2, -1, np.int64), np.full(1, -1, np.int64)
        loss = np.full(1, np.nan, np.float32)
        as_log = {"ppo_clip_low": lambda x: 1 - x, "ppo_clip_high": lambda x: 1 + x, "ppo_dual_clip": lambda x: x}
        limits = [math.log(as_log[name](x)) if name in as_log else x for name, x in LIMITS.items()]
        kinds = (DIVERGENCES.index(combination[0]), DIRECTIONS.index(combination[1]))
        arguments = TokenObjectiveArguments(
            *(n, topk, VOCAB, *addresses.values(), *kinds, TRUST_REGIONS.index(combination[2]), *limits),
            *map(address, (*floats.values(), means, maxima, histogram, loss, tokens)),
        )
        assert ctypes.sizeof(arguments) % 8 == 0
        emulated.token_objective(arguments, 1)
        known = {name: x[inside, :topk] if x.ndim == 2 else x[inside] for name, x in inputs.items()}
        expected, expected_totals = objective(known, *combination, LIMITS, VOCAB)
        expected |= {name: np.array(values) for name, values in expected_totals.items()}
        if any((values[~inside] != 0).any() for values in floats.values()):
            yield f"{combination}, {n} tokens: the results of a masked token are not 0"
        results = {**{name: x[inside] for name, x in floats.items()}, "means": means, "maxima": maxima}
        results |= {"histogram": histogram, "loss": loss[0], "tokens": tokens[0]}
        # Of the divergences as returned: of those in float64 one may lie on the other side of a bin's edge.
        moved = inputs["advantage"][inside] != 0
        expected["histogram"] = histogram_of(results["divergence"][moved].astype(np.float64))
        for name, value in expected.items():
            with np.errstate(invalid="ignore"):  # -inf - -inf, which the comparison before it takes care of
                error = np.where(results[name] == value, 0.0, np.abs(results[name] - value))
            if not (error <= TOLERANCE * max(1, n if name in ("means", "loss") else 1)).all():
                yield f"{combination}, {n} tokens: {name} is off by {error.max(initial=0.0):.1e}"
