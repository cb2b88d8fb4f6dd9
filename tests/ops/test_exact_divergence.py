"""The divergence of two sets of logits: their dtypes may differ, and rows or a mask say which tokens are compared."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dppo.ops.exact_divergence import vocab_parallel_divergence


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_different_dtypes_are_compared_in_the_wider(kind: str, backend: str) -> None:
    policy, rollout = torch.randn(5, 33), torch.randn(5, 33).bfloat16()
    mixed = vocab_parallel_divergence(policy, rollout, kind=kind, backend=backend)
    wide = vocab_parallel_divergence(policy, rollout.float(), kind=kind, backend=backend)
    assert torch.equal(mixed, wide)
    narrow = vocab_parallel_divergence(policy.bfloat16(), rollout, kind=kind, backend=backend)
    assert not torch.equal(mixed, narrow)


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_wide_rows_are_those_of_the_definition(kind: str, backend: str) -> None:
    """Several segments of each row on a GPU, whose parts are added up."""
    vocab = 40_001
    policy, rollout = 3 * torch.randn(2, 3, vocab + 2)
    got = vocab_parallel_divergence(policy, rollout, kind=kind, vocab_size=vocab, backend=backend)
    log_pi, log_mu = (logits[:, :vocab].double().log_softmax(-1) for logits in (policy, rollout))
    mu, pi = log_mu.exp(), log_pi.exp()
    terms = mu * (log_mu - log_pi) if kind == "kl" else 0.5 * (mu - pi).abs()
    # As in test_policy_stats.py, the sums' roundings; and each exponent's, which scales a probability by 30 * 2^-24 at most.
    error = 4 * (vocab / 16) ** 0.5 * 2.0**-24 + 30 * 2.0**-24
    allowed = error * (terms.abs() + mu + pi).sum(-1)
    assert bool(((got.double() - terms.sum(-1)).abs() <= allowed).all())


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_rows_and_a_mask_of_them_are_the_same(kind: str, backend: str) -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    policy, rollout = torch.randn(2, 2, 3, 17)
    policy[~mask] = math.nan
    masked = vocab_parallel_divergence(policy, rollout, kind=kind, vocab_size=15, token_mask=mask, backend=backend)
    rows = mask.flatten().nonzero()[:, 0]
    compact = vocab_parallel_divergence(policy, rollout, kind=kind, vocab_size=15, rows=rows, backend=backend)
    assert torch.equal(masked[rows], compact)
    assert masked.count_nonzero() == len(rows)
    with pytest.raises(ValueError, match="rows or token_mask, not both"):
        vocab_parallel_divergence(policy, rollout, kind=kind, rows=rows, token_mask=mask)
