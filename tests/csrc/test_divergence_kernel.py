"""The exact-divergence operator: plain torch's numbers, for plain and hybrid rollout policies, whole or in shards.

Tolerance: in either implementation (x - max) / T - log_sum is off by a few 2^-24 of its largest intermediate, M = the
largest |x| / T or log-prob, which scales a probability by 1 + 4 M 2^-24, and a KL's term has the same error times mu.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo.ops import torch_backend
from megatron_dppo.ops.exact_divergence import KnownProbabilities, vocab_parallel_divergence
from megatron_dppo.ops.shard_merge import MergedRows

native = pytest.importorskip("megatron_dppo.ops.native_backend", reason="the extension megatron_dppo._C is not built")
operators = torch.ops.megatron_dppo


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["tv", "kl"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    vocab=st.one_of(st.integers(6, 40), st.integers(1000, 5000)),
    padding=st.sampled_from([0, 5]),
    known=st.integers(0, 5),
    temperature=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_definition(
    kind: Any, dtype: torch.dtype, vocab: int, padding: int, known: int, temperature: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    mu = (5 * torch.randn(4, vocab + padding, generator=g)).to(dtype)
    pi = (mu.float() + torch.randn(4, vocab + padding, generator=g)).to(dtype)
    mu[0, :vocab:3] = -torch.inf  # impossible under mu alone, under pi alone
    pi[1, 1:vocab:3] = -torch.inf
    mask = torch.tensor([True, True, False, True])
    hybrid = None
    if known:
        ids = torch.stack([torch.randperm(vocab, generator=g)[:known] for _ in range(3)])
        share = 0.9 * torch.rand(ids.shape, generator=g) / known
        hybrid = KnownProbabilities(ids, share.log(), torch.rand(ids.shape, generator=g) < 0.8)

    def divergence(backend: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        logits = (x if dtype is None else x.to(dtype) for x in (pi, mu))
        return vocab_parallel_divergence(kind, *logits, mask, hybrid, temperature, vocab, backend=backend)

    exact, ours = divergence("torch", torch.float64), divergence("cpu")
    finite = mu[:, :vocab].double()
    largest = float(finite[finite.isfinite()].abs().max()) / temperature + 32
    # Where pi alone is 0 the terms are mu * 1e5 (LOG_ZERO); elsewhere they are of order 1 (TV) or `largest` (KL). The rest
    # of a hybrid mu is divided by a mass that is good to 2^-22 and may be as small as 1 / 100 here, or else is rounding.
    sizes = 1.0 + exact + (0.0 if kind == "tv" else largest)
    well_posed = (
        torch.ones(3, dtype=torch.bool) if hybrid is None else rest_of(mu[mask], hybrid, vocab, temperature) > 1e-2
    )
    tolerance = 8 * largest * 2.0**-24 * sizes * (1.0 if hybrid is None else 100.0)
    assert bool(((ours - exact).abs() <= tolerance)[well_posed].all()), (ours - exact, tolerance)
    assert bool(ours.isfinite().all())


def rest_of(mu: torch.Tensor, hybrid: KnownProbabilities, vocab: int, temperature: float) -> torch.Tensor:
    """[n] what the recomputed policy leaves to the tokens that the engine did not report."""
    p = (mu[:, :vocab].double() / temperature).softmax(-1)
    return 1 - (p.gather(1, hybrid.ids) * hybrid.valid).sum(1)


def arguments(n: int = 3, vocab: int = 50) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    pi, mu = torch.randn(2, n, vocab, generator=g)
    normalisers = (
        [x.max(1).values for x in (pi, mu)],
        [(x - x.max(1, keepdim=True).values).logsumexp(1) for x in (pi, mu)],
    )
    return {
        "logits": pi,
        "rollout_logits": mu,
        "rows": None,
        "max": normalisers[0][0],
        "log_sum": normalisers[1][0],
        "rollout_max": normalisers[0][1],
        "rollout_log_sum": normalisers[1][1],
        "known_ids": torch.tensor([[3, 49, -1]] * n),
        "known_log_prob": torch.full((n, 3), -2.0),
        "log_rescale": torch.full((n,), -0.3),
        "distance": "kl",
        "temperature": 1.0,
        "first_column": 0,
        "num_columns": vocab,
    }


def test_shards_add_up_to_the_whole() -> None:
    whole = arguments()
    parts = 0
    for first in (0, 20, 40):
        last = min(first + 20, 50)
        cut = {name: whole[name][:, first:last].contiguous() for name in ("logits", "rollout_logits")}
        parts = parts + operators.shard_divergence(
            **(whole | cut | {"first_column": first, "num_columns": last - first})
        )
    torch.testing.assert_close(parts, operators.shard_divergence(**whole), rtol=1e-5, atol=1e-6)


def test_a_long_row_is_split_over_threads() -> None:
    torch.set_num_threads(2)
    long = arguments(1, 300_001)
    merged = [
        MergedRows(*[torch.empty(0)] * 4, long[prefix + "max"], long[prefix + "log_sum"]) for prefix in ("", "rollout_")
    ]
    known = (long["known_ids"], long["known_log_prob"], long["log_rescale"])
    shared = ("kl", long["logits"], long["rollout_logits"], None, *merged, *known, 1.0, 0, 300_001)
    # Sums of 300,001 terms in two orders, of total size 1.
    torch.testing.assert_close(
        native.shard_divergence(*shared), torch_backend.shard_divergence(*shared), rtol=1e-4, atol=1e-5
    )


def test_different_dtypes_are_compared_in_the_wider() -> None:
    pi, mu = torch.randn(2, 3, 40)
    mask = torch.ones(3, dtype=torch.bool)
    mixed = vocab_parallel_divergence("tv", pi.bfloat16(), mu, mask, backend="cpu")
    assert torch.equal(mixed, vocab_parallel_divergence("tv", pi.bfloat16().float(), mu, mask, backend="cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout_logits": torch.zeros(3, 49)}, "rollout_logits must match logits"),
        ({"rollout_logits": torch.zeros(3, 50, dtype=torch.bfloat16)}, "rollout_logits must match logits"),
        ({"rollout_logits": torch.zeros(50, 3).t()}, "rollout_logits must have contiguous columns"),
        ({"rollout_max": torch.zeros(2)}, "rollout_max must have shape"),
        ({"known_ids": torch.zeros(3, dtype=torch.int64)}, "known_ids must be a matrix"),
        ({"known_log_prob": None}, "known_ids needs known_log_prob and log_rescale"),
        ({"log_rescale": torch.zeros(3, 1)}, "log_rescale must have shape"),
        ({"distance": "js"}, "distance must be one of tv, kl, not 'js'"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        operators.shard_divergence(**(arguments() | change))


def test_the_operator_describes_itself_to_the_compiler() -> None:
    torch.library.opcheck(
        operators.shard_divergence.default, tuple(arguments().values()), test_utils=("test_schema", "test_faketensor")
    )
