"""The token-objective operator against float64, down to log-probs that are 0, -inf or a rounding away from either.

Tolerance on D. exp, log and their kin are good to 2^-22, so each term of a sum is off by at most 2^-21 of its size. A
remaining mass is a difference of sums of at most K + 1 probabilities, off by (K + 3) 2^-23; a KL takes its logarithm, so
what that error does is found by moving both masses that far, in float64.

On the weight and the coefficient, where D is not within its tolerance of the threshold: numbers of size 1, from at most
eight roundings of 2^-24, of which ``smooth`` divides two by its threshold. On the sums: that, times the number of tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.csrc import token_objective_reference as reference

pytest.importorskip("megatron_dppo.ops.native_backend", reason="the extension megatron_dppo._C is not built")
from megatron_dppo import _C

operators = torch.ops.megatron_dppo
VOCAB = 50
NO_ID = -100
CERTAIN = (0.0, -1e-38, -1e-30, -1e-7, -1e-3)
IMPOSSIBLE = (-50.0, -1e4, -math.inf)
DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl", "given")
DIRECTIONS = ("ratio", "exact_collision", "aggregated_tail", "uniform_tail", "symmetric")
TRUST_REGIONS = ("mask", "smooth", "ppo_clip", "cispo", "none")
COUNTED = {  # numbers of tokens, which are exact
    name
    for pair in reference.MEANS.values()
    for name in pair
    if name.startswith(("masked", "moved", "positive", "negative", "tokens", "ppo", "bad"))
}
TOPK = ("topk_ids", "topk_log_mu", "topk_log_pi")
LIMITS = {
    "delta_low": 0.05,
    "delta_high": 0.1,
    "ratio_cap": math.inf,
    "ppo_clip_low": 0.2,
    "ppo_clip_high": 0.28,
    "ppo_dual_clip": 2.0,
    "cispo_ratio_min": 0.5,
    "cispo_ratio_max": 1.5,
}
Tokens = dict[str, torch.Tensor]


def make_tokens(n: int, k: int, seed: int) -> Tokens:
    """Tokens of two policies, some of them certain or impossible under either."""
    g = torch.Generator().manual_seed(seed)
    log_mu = (2 * torch.randn(n, VOCAB, generator=g)).log_softmax(-1)
    log_pi = (log_mu + torch.randn(n, VOCAB, generator=g)).log_softmax(-1)
    target = torch.randint(0, VOCAB, (n,), generator=g)
    topk_log_mu, ids = log_mu.topk(k, dim=-1)
    if k > 1:
        target[::2] = ids[::2, 1]
    sampled_mu, sampled_pi = (x.gather(1, target[:, None])[:, 0] for x in (log_mu, log_pi))
    topk_log_pi = log_pi.gather(1, ids)
    for i, (a, b) in enumerate([(x, y) for x in CERTAIN for y in CERTAIN + IMPOSSIBLE]):
        row = 3 * i + 1
        if row >= n:
            break
        sampled_mu[row], sampled_pi[row] = a, b
        topk_log_mu[row], topk_log_pi[row] = -math.inf, min(math.log(-math.expm1(max(b, -50.0)) + 1e-40), -1.0) - k
        if k > 1 and row % 2 == 0:
            topk_log_mu[row, 1], topk_log_pi[row, 1] = a, b
    return {
        "log_mu": sampled_mu,
        "log_pi": sampled_pi,
        "advantages": torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.8),
        "entropy": torch.rand(n, generator=g),
        "collision": log_pi.exp().square().sum(1),
        "target": target,
        "topk_ids": ids,
        "topk_log_mu": topk_log_mu,
        "topk_log_pi": topk_log_pi,
        "given_divergence": 0.3 * torch.rand(n, generator=g),
    }


def call(tokens: Tokens, mask: torch.Tensor | None = None, **changes: Any) -> tuple[torch.Tensor, ...]:
    """The operator on ``tokens``; ``changes``: divergence, direction, trust_region, and limits by name."""
    kinds = {"divergence": "binary_tv", "direction": "ratio", "trust_region": "mask"}
    limits = LIMITS | {name: changes.pop(name) for name in list(changes) if name in LIMITS}
    kinds |= changes
    given = tokens if kinds["divergence"] == "given" else tokens | {"given_divergence": None}
    return operators.token_objective(
        **given, mask=mask, vocab_size=VOCAB, **kinds, limits=[limits[name] for name in _C.limit_names]
    )


def as_numpy(tokens: Tokens) -> dict[str, np.ndarray]:
    return {("advantage" if name == "advantages" else name): values.numpy() for name, values in tokens.items()}


def divergence_tolerance(x: dict[str, np.ndarray], divergence: str) -> np.ndarray:
    """[n] how far D may be off (the module's docstring)."""
    n, k = x["topk_ids"].shape
    mass_error = (k + 3) * 2.0**-23
    if divergence == "given":
        return np.zeros(n)
    if divergence.endswith("tv"):
        return np.full(n, 4 * mass_error)
    log_zero = reference.LOG_ZERO
    if divergence == "binary_kl":
        log_mu, log_pi = x["log_mu"].astype(np.float64), x["log_pi"].astype(np.float64)
        other = -np.expm1(log_mu) * (np.abs(reference.log1mexp(log_mu)) + np.abs(reference.log1mexp(log_pi)))
        return 2.0**-20 * (np.exp(log_mu) * (np.abs(log_mu) + np.abs(np.maximum(log_pi, log_zero))) + other)
    log_mu, log_pi, valid = reference.known_tokens(x)
    mu, pi = np.exp(log_mu) * valid, np.exp(log_pi) * valid
    terms = mu * (np.abs(np.maximum(log_mu, log_zero)) + np.abs(np.maximum(log_pi, log_zero)))

    def other(mu: np.ndarray, pi: np.ndarray) -> np.ndarray:
        return mu * (np.log(np.maximum(mu, reference.TINY)) - np.log(np.maximum(pi, reference.TINY)))

    mu_rest, pi_rest = (reference.remaining_mass(log_p, valid) for log_p in (log_mu, log_pi))
    # No mass falls below 2^-23 of what it is taken from, nor below the smallest number.
    moved = np.stack(
        [
            other(np.maximum(mu_rest + a * mass_error, 0), np.maximum(pi_rest + b * mass_error, 2.0**-24 * pi.sum(1)))
            for a in (-1, 0, 1)
            for b in (-1, 0, 1)
        ]
    )
    return 2.0**-20 * terms.sum(1) + np.ptp(moved, axis=0) + 2.0**-20 * np.abs(moved).max(0)


@settings(max_examples=100)
@given(
    divergence=st.sampled_from(DIVERGENCES),
    trust_region=st.sampled_from(TRUST_REGIONS),
    k=st.integers(0, 6),
    n=st.integers(1, 150),
    seed=st.integers(0, 2**31),
    cap=st.sampled_from([math.inf, 1.2]),
)
def test_it_is_what_the_formulas_say(divergence: str, trust_region: str, k: int, n: int, seed: int, cap: float) -> None:
    tokens = make_tokens(n, k, seed)
    x = as_numpy(tokens)
    mu, pi = np.exp(x["log_mu"].astype(np.float64)), np.exp(x["log_pi"].astype(np.float64))
    borders = np.abs(mu[:, None] - np.array(reference.EDGES[1:-1])).min() > 1e-6
    assume(bool(borders) and bool((np.abs(mu - pi - 0.5) > 1e-6).all()))  # else a count may differ by rounding

    limits = LIMITS | {"ratio_cap": cap}
    coefficient, weight, d, means, maxima, histogram, loss, number = (
        y.numpy() for y in call(tokens, divergence=divergence, trust_region=trust_region, ratio_cap=cap)
    )
    expected, of_all = reference.objective(x, divergence, "ratio", trust_region, limits, VOCAB)
    tolerance = divergence_tolerance(x, divergence)
    assert (np.abs(d - expected["divergence"]) <= tolerance).all()
    assert np.isfinite(d).all()

    delta = np.where(x["advantage"] > 0, limits["delta_high"], limits["delta_low"])
    decided = np.abs(expected["divergence"] - delta) > tolerance + 2.0**-24
    slack = 2.0**-21 + (2.0**-22 / limits["delta_low"] if trust_region == "smooth" else 0.0)
    for got, name in ((weight, "weight"), (coefficient, "coefficient")):
        size = 1 + np.abs(expected[name]) + (capped(x, cap) if name == "coefficient" else 0.0)
        assert (np.abs(got - expected[name]) <= slack * size)[decided].all(), name

    histogram_of_own = reference.histogram_of(d[x["advantage"] != 0].astype(np.float64))
    assert np.array_equal(histogram, histogram_of_own)
    if not decided.all():
        return
    size = 1 + max(np.abs(expected[name]).max() for name in ("weight", "coefficient"))
    everything = [
        of_one
        for pair, got, want in zip(reference.MEANS.values(), means, of_all["means"], strict=True)
        for of_one in zip(pair, got, want, strict=True)
    ]
    everything += zip(reference.MAXIMA, maxima, of_all["maxima"], strict=True)
    for name, got_total, want in [*everything, ("loss", loss, of_all["loss"]), ("tokens", number, n)]:
        if name in COUNTED:
            allowed = 0.0
        elif name.startswith("divergence"):
            allowed = tolerance.sum()
        else:
            allowed = 2.0**-20 * abs(want) + n * slack * size if math.isfinite(want) else 0.0
        assert got_total == want or abs(got_total - want) <= allowed, name


def capped(x: dict[str, np.ndarray], cap: float) -> np.ndarray:
    """[n] what a weight is multiplied by."""
    ratio = np.exp(np.clip(x["log_pi"] - x["log_mu"], -20, 20).astype(np.float64))
    return np.minimum(ratio, cap) * np.abs(x["advantage"])


@pytest.mark.parametrize("direction", DIRECTIONS[1:4])
@pytest.mark.parametrize("k", [0, 3])
def test_predictive_directions_agree(direction: str, k: int) -> None:
    tokens = make_tokens(1000, k, seed=5)
    tiny = {"delta_low": 1e-9, "delta_high": 1e-9}
    weight = call(tokens, direction=direction, **tiny)[1]
    x = as_numpy(tokens)
    expected = reference.objective(x, "binary_tv", direction, "mask", LIMITS | tiny, VOCAB)[0]["weight"]
    # A sign may differ where the growth is itself a rounding of numbers of size 1, or D one (rows 1, 4, ..., 118).
    certain = np.abs(reference.growth_of(x, direction, VOCAB)) > 2.0**-20
    ordinary = np.full(1000, True)
    ordinary[1:121:3] = False
    assert certain[ordinary].mean() > 0.98
    assert np.array_equal(weight.numpy()[certain & ordinary], expected[certain & ordinary])
    assert 0.2 < float(weight[ordinary].mean()) < 0.8


@pytest.mark.parametrize("trust_region", ["mask", "smooth"])
def test_a_symmetric_direction_holds_back_whatever_is_far_away(trust_region: str) -> None:
    tokens = make_tokens(1000, 0, seed=6)
    both = {"trust_region": trust_region, "delta_low": 0.05, "delta_high": 0.05}
    _, weight, divergence, *_ = call(tokens, direction="symmetric", **both)
    expected = (divergence <= 0.05).float() if trust_region == "mask" else 1 - divergence / 0.05  # D = |mu - pi|
    torch.testing.assert_close(weight, expected, rtol=0, atol=2.0**-18)  # exp(), twice, of up to 1, by 0.05
    one_sided = call(tokens, direction="ratio", **both)[1]
    assert (one_sided >= weight).all()
    assert (one_sided > weight).any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("inside", ["some", "all", "none"])
def test_tokens_outside_the_mask_are_not_looked_at(divergence: str, inside: str) -> None:
    """Bit for bit what the tokens inside give alone."""
    n = 1500  # more than one chunk of a thread's
    tokens = make_tokens(n, 3, seed=3)
    mask = {"some": torch.arange(n) % 3 != 1, "all": torch.full((n,), True), "none": torch.full((n,), False)}[inside]
    alone = {name: values[mask].contiguous() for name, values in tokens.items()}
    spoilt = {
        name: values.clone().index_fill_(0, (~mask).nonzero()[:, 0], NO_ID if values.dtype == torch.int64 else math.nan)
        for name, values in tokens.items()
    }
    kinds = {"divergence": divergence, "direction": "uniform_tail"}
    expected, got = call(alone, **kinds), call(spoilt, mask, **kinds)
    for values, values_alone in zip(got[:3], expected[:3], strict=True):
        assert torch.equal(values[mask], values_alone)
        assert torch.equal(values[~mask], torch.zeros(n - len(values_alone)))
    # Chunks of tokens are added up in order, and a chunk with gaps is another chunk: equal but for fp64's rounding.
    torch.testing.assert_close(got[3], expected[3], rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(got[6], expected[6], rtol=2.0**-23, atol=1e-12)
    assert torch.equal(got[4], expected[4])
    assert torch.equal(got[5], expected[5])
    assert int(got[7]) == int(mask.sum())


def test_without_a_top_k_the_sampled_token_alone_is_known() -> None:
    tokens = make_tokens(200, 0, seed=4)
    without = tokens | dict.fromkeys(TOPK)
    for direction in DIRECTIONS:
        kinds = {"divergence": "topk_kl", "direction": direction}
        assert all(map(torch.equal, call(without, **kinds), call(tokens, **kinds)))


def test_the_same_tokens_give_the_same_bits_on_any_number_of_threads() -> None:
    tokens = make_tokens(5000, 3, seed=1)
    threads = torch.get_num_threads()
    runs = []
    for number in (1, 2):
        torch.set_num_threads(number)
        runs.append(call(tokens, divergence="topk_kl"))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *runs))


def test_nan_reaches_the_loss() -> None:
    tokens = make_tokens(4, 2, seed=0)
    tokens["log_pi"][2] = math.nan
    tokens["advantages"][2] = 1.0
    for kinds in ({}, {"divergence": "topk_kl", "trust_region": "cispo", "ratio_cap": 2.0}):
        coefficient, _, _, _, maxima, _, loss, _ = call(tokens, **kinds)
        assert coefficient.isnan().tolist() == [False, False, True, False]
        assert bool(maxima[_C.maximum_names.index("ratio_max")].isnan())
        assert bool(loss.isnan())


def test_the_extension_says_what_it_measures_against() -> None:
    assert _C.limit_names == tuple(LIMITS)
    assert _C.mean_names == tuple(reference.MEANS)
    assert _C.maximum_names == reference.MAXIMA
    assert _C.metric_constants == {
        "reference_clip": 0.2,
        "bad_update_drop": 0.5,
        "probability_bins": reference.EDGES,
        "histogram_lowest": -6,
        "histogram_highest": 2,
        "histogram_bins_per_decade": 40,
    }


def arguments() -> dict[str, Any]:
    return {
        **make_tokens(5, 2, seed=0),
        "given_divergence": None,
        "mask": None,
        "vocab_size": VOCAB,
        "divergence": "binary_tv",
        "direction": "ratio",
        "trust_region": "mask",
        "limits": list(LIMITS.values()),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_mu": torch.zeros(2, 2)}, "log_mu must be a vector"),
        ({"log_mu": torch.zeros(5, dtype=torch.float64)}, "log_mu must be Float"),
        ({"log_pi": torch.zeros(4)}, "log_pi must have shape"),
        ({"target": torch.zeros(5, dtype=torch.int32)}, "target must be Long"),
        ({"mask": torch.ones(5)}, "mask must be Bool"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, "mask must have shape"),
        ({"topk_ids": torch.zeros(5, dtype=torch.int64)}, "topk_ids must be a matrix"),
        ({"topk_log_pi": torch.zeros(5, 3)}, "topk_log_pi must have shape"),
        ({"topk_log_pi": None}, "topk_ids, topk_log_mu and topk_log_pi must be given together"),
        ({"topk_ids": None}, "topk_ids, topk_log_mu and topk_log_pi must be given together"),
        ({"given_divergence": torch.zeros(5)}, "given_divergence goes with divergence='given'"),
        ({"divergence": "given"}, "given_divergence goes with divergence='given'"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"divergence": "binary"}, "divergence must be one of binary_tv, .*, not 'binary'"),
        ({"direction": "predictive"}, "direction must be one of ratio, .*, not 'predictive'"),
        ({"trust_region": "clip"}, "trust_region must be one of mask, .*, not 'clip'"),
        ({"limits": [0.1, 0.2]}, "limits must have 8 values .*, not 2"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        operators.token_objective(**(arguments() | change))


def test_the_operator_describes_itself_to_the_compiler() -> None:
    torch.library.opcheck(
        operators.token_objective.default, (), arguments(), test_utils=("test_schema", "test_faketensor")
    )
