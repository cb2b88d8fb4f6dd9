"""Divergences: ordered by how much of the vocabulary they see, never NaN, and right where fp32 is thin."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo.loss.divergences import binary_kl, binary_tv, known_tokens, topk_kl, topk_tv
from megatron_dppo.ops.exact_divergence import vocab_parallel_divergence

# Compared in float64: with |logit| <= 12 the mass outside the top K is at least e^-24 = 4e-11, known to 2e-16, so its
# logarithm is off by 6e-6 at most.
SLACK = 1e-5


@st.composite
def policy_pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    vocab = draw(st.integers(3, 12))
    logits = st.lists(st.floats(-12, 12, width=32), min_size=vocab, max_size=vocab)
    mu, pi = (torch.tensor(draw(logits), dtype=torch.float64) for _ in range(2))
    return mu, pi, draw(st.integers(0, vocab - 1)), draw(st.integers(1, vocab))


def all_divergences(kind: str, mu: torch.Tensor, pi: torch.Tensor, token: int, k: int) -> tuple[float, float, float]:
    log_mu, log_pi = mu.log_softmax(-1), pi.log_softmax(-1)
    target, ids = torch.tensor([token]), log_mu.topk(k).indices[None]
    known = known_tokens(log_mu[target], log_pi[target], target, ids, log_mu[ids], log_pi[ids])
    binary = (binary_tv if kind == "tv" else binary_kl)(log_mu[target], log_pi[target])
    topk = (topk_tv if kind == "tv" else topk_kl)(known)
    exact = vocab_parallel_divergence(pi[None], mu[None], kind="tv" if kind == "tv" else "kl", backend="torch")
    return float(binary), float(topk), float(exact)


@pytest.mark.parametrize("kind", ["tv", "kl"])
@settings(max_examples=60)
@given(pair=policy_pairs())
def test_seeing_more_of_the_vocabulary_never_lowers_the_divergence(
    kind: str, pair: tuple[torch.Tensor, torch.Tensor, int, int]
) -> None:
    binary, topk, exact = all_divergences(kind, *pair)
    assert binary <= topk + SLACK
    assert topk <= exact + SLACK


@settings(max_examples=100)
@given(
    log_mu=st.floats(-(2.0**100), 0.0, width=32),
    log_pi=st.floats(-math.inf, 0.0, width=32, allow_infinity=True),
)
def test_binary_divergences_are_finite_for_all_log_probs(log_mu: float, log_pi: float) -> None:
    mu, pi = torch.tensor([log_mu]), torch.tensor([log_pi])
    for divergence in (binary_tv(mu, pi), binary_kl(mu, pi)):
        assert bool(divergence.isfinite().all())
        assert float(divergence) >= 0.0


@pytest.mark.parametrize(
    ("mu", "pi", "expected"),
    [
        (1.0, 1.0, 0.0),
        (1.0, 0.5, math.log(2)),
        (1.0, 1e-6, math.log(1e6)),
        (0.5, 0.5, 0.0),
        (1 - 1e-6, 0.9, (1 - 1e-6) * math.log((1 - 1e-6) / 0.9) + 1e-6 * math.log(1e-6 / 0.1)),
    ],
)
def test_binary_kl_at_the_edges(mu: float, pi: float, expected: float) -> None:
    log_mu, log_pi = (torch.tensor([p], dtype=torch.float64).log().float() for p in (mu, pi))
    assert float(binary_kl(log_mu, log_pi)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_certainty_that_the_rollout_policy_did_not_have_is_a_large_finite_divergence() -> None:
    log_mu = torch.tensor([0.5, 0.9, 0.99]).log()
    divergence = binary_kl(log_mu, torch.zeros(3))
    assert bool((divergence > 0.5).all())
    assert bool((divergence < 100).all())


def test_near_certain_tokens_keep_their_digits() -> None:
    """mu = 1 - 2e-6, pi = 1 - 1e-6: KL is of order 1e-7. From bf16 or `1 - exp(lp) + eps` nothing of it would be left."""
    log_mu, log_pi = (torch.tensor([-p], dtype=torch.float64).log1p() for p in (2e-6, 1e-6))
    exact = float(binary_kl(log_mu, log_pi))
    assert exact > 1e-7
    # mu log(mu/pi) and the other term are 1e-6 each and cancel to 4e-7; each carries 1e-7 relative, plus exp's ulp.
    assert float(binary_kl(log_mu.float(), log_pi.float())) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_topk_of_the_whole_vocabulary_is_exact(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    mu, pi = torch.randn(2, 9, generator=generator)
    _, topk, exact = all_divergences(kind, mu, pi, token=4, k=9)
    assert topk == pytest.approx(exact, abs=1e-6)


def test_a_sampled_token_outside_the_top_k_gets_a_slot_of_its_own() -> None:
    mu = torch.tensor([0.5, 0.3, 0.15, 0.05])
    pi = torch.tensor([0.2, 0.3, 0.25, 0.25])
    ids = torch.tensor([[0, 1]])

    def slots(token: int) -> float:
        t = torch.tensor([token])
        known = known_tokens(mu.log()[t], pi.log()[t], t, ids, mu.log()[ids], pi.log()[ids])
        assert int(known.valid.sum()) == (3 if token > 1 else 2)
        return float(topk_tv(known))

    # Token 3: slots {0, 1, 3, other = 2}. Token 1: slots {0, 1, other = 2 + 3}.
    assert slots(3) == pytest.approx(0.5 * (0.3 + 0 + 0.2 + 0.1), abs=1e-6)
    assert slots(1) == pytest.approx(0.5 * (0.3 + 0 + 0.3), abs=1e-6)
