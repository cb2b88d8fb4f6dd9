"""The token-update operator: what plain torch computes, down to corners where log-probs are 0, -inf or a rounding away.

Tolerance on D. exp, log and their kin are good to 2^-22, so each term of a sum is off by at most 2^-21 of its size in either
implementation. A remaining mass is a difference of sums of at most K + 1 probabilities, off by (K + 3) 2^-23; a KL takes
its logarithm, so what that error does is found by moving both masses that far, in float64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo import DPPOConfig, PolicyStats
from megatron_dppo.loss.config import TRUST_REGIONS
from megatron_dppo.loss.divergences import known_tokens
from megatron_dppo.loss.fused_objective import fused_token_update
from megatron_dppo.loss.inputs import TokenBatch
from megatron_dppo.loss.objective import TokenUpdate, token_update
from megatron_dppo.ops.probability import LOG_ZERO, log1mexp

pytest.importorskip("megatron_dppo.ops.native_backend", reason="the extension megatron_dppo._C is not built")
operators = torch.ops.megatron_dppo
VOCAB = 50
CERTAIN = (0.0, -1e-38, -1e-30, -1e-7, -1e-3)
IMPOSSIBLE = (-50.0, -1e4, -math.inf)


def make_tokens(n: int, k: int, seed: int) -> tuple[TokenBatch, PolicyStats]:
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
    advantages = torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.8)
    mask = torch.ones(n, dtype=torch.bool)
    tokens = TokenBatch(mask, torch.arange(n), target, advantages, sampled_mu, ids, topk_log_mu, None)
    entropy, collision = torch.rand(n, generator=g), log_pi.exp().square().sum(1)
    return tokens, PolicyStats(sampled_pi, entropy, collision, topk_log_pi)


def divergence_tolerance(config: DPPOConfig, tokens: TokenBatch, policy: PolicyStats) -> torch.Tensor:
    """[n] how far two correct fp32 values of D may be apart (the module's docstring)."""
    partition, kind = config.divergence.split("_")
    k = tokens.topk_ids.shape[1]
    mass_error = (k + 3) * 2.0**-23
    if kind == "tv":
        return torch.full_like(policy.log_prob, 4 * mass_error).double()
    log_mu, log_pi = tokens.rollout_log_probs.double(), policy.log_prob.double()
    if partition == "binary":
        other = -torch.expm1(log_mu) * (log1mexp(log_mu.float()).abs() + log1mexp(log_pi.float()).abs())
        return 2.0**-20 * (log_mu.exp() * (log_mu.abs() + log_pi.clamp(min=LOG_ZERO).abs()) + other)
    assert policy.topk_log_prob is not None
    known = known_tokens(
        log_mu, log_pi, tokens.target, tokens.topk_ids, tokens.topk_log_probs.double(), policy.topk_log_prob.double()
    )
    terms = known.mu * (known.log_mu.clamp(min=LOG_ZERO).abs() + known.log_pi.clamp(min=LOG_ZERO).abs())
    tiny = torch.finfo(torch.float32).tiny

    def other(mu: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
        return mu * (mu.clamp(min=tiny).log() - pi.clamp(min=tiny).log())

    mu, pi = known.mu_other, known.pi_other
    # Neither implementation lets a mass fall below 2^-23 of what it is taken from, nor below the smallest number.
    moved = [
        other((mu + a * mass_error).clamp(min=0), torch.maximum(pi + b * mass_error, 2.0**-24 * known.pi.sum(1)))
        for a in (-1, 0, 1)
        for b in (-1, 0, 1)
    ]
    spread = torch.stack(moved).max(0).values - torch.stack(moved).min(0).values
    return 2.0**-20 * terms.sum(1) + spread + 2.0**-20 * torch.stack(moved).abs().max(0).values


def both(config: DPPOConfig, tokens: TokenBatch, policy: PolicyStats) -> tuple[TokenUpdate, TokenUpdate]:
    given_divergence = 0.3 * policy.entropy if config.divergence.startswith("exact") else None
    arguments = (config, tokens, policy, given_divergence, VOCAB)
    return token_update(*arguments), fused_token_update(*arguments)


@settings(max_examples=60, deadline=None)
@given(
    divergence=st.sampled_from(["binary_tv", "binary_kl", "topk_tv", "topk_kl", "exact_kl"]),
    trust_region=st.sampled_from(TRUST_REGIONS),
    k=st.integers(0, 6),
    n=st.integers(1, 150),
    seed=st.integers(0, 2**31),
    cap=st.sampled_from([None, 1.2]),
)
def test_it_is_the_plain_torch_definition(
    divergence: str, trust_region: str, k: int, n: int, seed: int, cap: float | None
) -> None:
    config = DPPOConfig(divergence=divergence, trust_region=trust_region, ratio_cap=cap, ppo_dual_clip=2.0)
    tokens, policy = make_tokens(n, k, seed)
    plain, fused = both(config, tokens, policy)
    tolerance = divergence_tolerance(config, tokens, policy)
    error = (plain.divergence.double() - fused.divergence.double()).abs()
    assert bool((error <= tolerance).all()), (error - tolerance).max()
    assert bool(fused.divergence.isfinite().all())

    delta = torch.where(tokens.advantages > 0, *(config.thresholds[i] for i in (1, 0)))
    decided = (plain.divergence - delta).abs() > tolerance
    # Of numbers up to e^20, 1 and 1: two roundings each.
    for name in ("weight", "coefficient"):
        ours, definition = getattr(fused, name)[decided], getattr(plain, name)[decided]
        torch.testing.assert_close(ours, definition, rtol=2.0**-20, atol=2.0**-20)
    if bool(decided.all()):
        assert_same_metrics(plain, fused, float(tolerance.sum()))


def assert_same_metrics(plain: TokenUpdate, fused: TokenUpdate, tolerance: float) -> None:
    assert fused.metrics.keys() == plain.metrics.keys()
    for name, (numerator, denominator) in plain.metrics.items():
        assert torch.equal(fused.metrics[name][1], denominator), name
        slack = tolerance if "divergence" in name else 0.0
        torch.testing.assert_close(fused.metrics[name][0], numerator, rtol=2.0**-19, atol=2.0**-19 + slack)
    for name, value in plain.extrema.items():
        torch.testing.assert_close(fused.extrema[name], value, rtol=2.0**-19, atol=2.0**-19 + tolerance)
    assert int(fused.divergence_histogram.sum()) == int(plain.divergence_histogram.sum())


@pytest.mark.parametrize("estimator", ["exact_collision", "aggregated_tail", "uniform_tail"])
@pytest.mark.parametrize("k", [0, 3])
def test_predictive_directions_agree(estimator: str, k: int) -> None:
    config = DPPOConfig(direction="predictive", predictive_estimator=estimator, delta_low=1e-9, delta_high=1e-9)
    tokens, policy = make_tokens(1000, k, seed=5)
    plain, fused = both(config, tokens, policy)
    # A sign may differ where the growth is itself a rounding: tokens that are certain or impossible (rows 1, 4, ..., 118).
    ordinary = torch.ones(1000, dtype=torch.bool)
    ordinary[1:121:3] = False
    assert torch.equal(plain.weight[ordinary], fused.weight[ordinary])
    assert 0.2 < float(fused.weight[ordinary].mean()) < 0.8


def test_the_same_tokens_give_the_same_bits_on_any_number_of_threads() -> None:
    tokens, policy = make_tokens(5000, 3, seed=1)
    threads = torch.get_num_threads()
    runs = []
    for number in (1, 2):
        torch.set_num_threads(number)
        runs.append(fused_token_update(DPPOConfig(divergence="topk_kl"), tokens, policy, None, VOCAB))
    torch.set_num_threads(threads)
    for name, pair in runs[0].metrics.items():
        assert all(map(torch.equal, pair, runs[1].metrics[name])), name
    assert torch.equal(runs[0].divergence_histogram, runs[1].divergence_histogram)


def test_nan_reaches_the_loss() -> None:
    tokens, policy = make_tokens(4, 2, seed=0)
    policy.log_prob[2] = math.nan
    tokens.advantages[2] = 1.0
    for config in (DPPOConfig(), DPPOConfig(divergence="topk_kl", trust_region="cispo", ratio_cap=2.0)):
        for update in both(config, tokens, policy):
            assert update.coefficient.isnan().tolist() == [False, False, True, False]
            assert bool(update.extrema["mismatch/ratio_max"].isnan())


def arguments_of(tokens: TokenBatch, policy: PolicyStats) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments, as fused_token_update passes them."""
    caught: list[Any] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "token_update" in str(func):
                caught.append((args, kwargs))
            return func(*args, **(kwargs or {}))

    with Recorder():
        fused_token_update(DPPOConfig(), tokens, policy, None, VOCAB)
    return caught[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_mu": torch.zeros(2, 2)}, "log_mu must be a vector"),
        ({"log_mu": torch.zeros(5, dtype=torch.float64)}, "log_mu must be Float"),
        ({"log_pi": torch.zeros(4)}, "log_pi must have shape"),
        ({"target": torch.zeros(5, dtype=torch.int32)}, "target must be Long"),
        ({"topk_ids": torch.zeros(5, dtype=torch.int64)}, "topk_ids must be a matrix"),
        ({"topk_log_pi": torch.zeros(5, 3)}, "topk_log_pi must have shape"),
        ({"given_divergence": torch.zeros(5)}, "given_divergence goes with divergence='given'"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"divergence": "binary"}, "divergence must be one of binary_tv, .*, not 'binary'"),
        ({"direction": "predictive"}, "direction must be one of ratio, .*, not 'predictive'"),
        ({"trust_region": "clip"}, "trust_region must be one of mask, .*, not 'clip'"),
        ({"probability_bins": [0.0, 1.0]}, "probability_bins must have 6 edges, not 2"),
        ({"histogram_bins": 0}, "histogram_bins must be in"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    args, kwargs = arguments_of(*make_tokens(5, 2, seed=0))
    names = [argument.name for argument in operators.token_update.default._schema.arguments]
    given_by_name = dict(zip(names, args, strict=False)) | kwargs
    with pytest.raises(ValueError, match=message):
        operators.token_update(**(given_by_name | change))


def test_the_operator_describes_itself_to_the_compiler() -> None:
    args, kwargs = arguments_of(*make_tokens(5, 2, seed=0))
    torch.library.opcheck(operators.token_update.default, args, kwargs, test_utils=("test_schema", "test_faketensor"))
