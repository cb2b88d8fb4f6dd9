"""The exact-divergence operator against float64, for plain and hybrid rollout policies, whole or in shards.

``expected_divergence`` counts the roundings of every term.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("megatron_dppo.ops.native_backend", reason="the extension megatron_dppo._C is not built")
operators = torch.ops.megatron_dppo
LOG_ZERO = -1e5  # megatron_dppo/ops/probability.py
NO_ID = -100
ROUNDING = 2.0**-24  # of a float, to nearest
EXP2_ROUNDINGS = 4  # csrc/cpu/vector_math.h: 2e-7
SUM_ROUNDINGS = 21  # csrc/cpu/lane_sums.h: sum_terms of a chunk of 1024; what is left is in double precision


def normaliser(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] float32 max and log_sum of z, computed in float64."""
    z = logits.double() / temperature
    top = z.max(1).values
    return top.float(), (z - top[:, None]).logsumexp(1).float()


def expected_divergence(
    kind: str,
    pi: torch.Tensor,
    mu: torch.Tensor,
    temperature: float,
    known: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] D(mu || pi) in float64 from logits of the true vocabulary, and by how much single precision may miss it."""
    (log_pi, error_pi), (log_mu, error_mu) = log_probs(pi, temperature), log_probs(mu, temperature)
    if known is not None:
        ids, log_prob, log_rescale = known
        log_mu = log_mu + log_rescale[:, None]
        error_mu = error_mu + ROUNDING * (4 * log_rescale.abs()[:, None] + 2 * log_mu.abs())
        for row, slot in (ids >= 0).nonzero().tolist():
            log_mu[row, ids[row, slot]] = log_prob[row, slot]
            error_mu[row, ids[row, slot]] = 3 * ROUNDING * log_prob[row, slot].abs()
    impossible_pi, impossible_mu = log_pi <= LOG_ZERO, log_mu <= LOG_ZERO
    error_pi, error_mu = error_pi.masked_fill(impossible_pi, 0.0), error_mu.masked_fill(impossible_mu, 0.0)
    log_pi, log_mu = log_pi.clamp(min=LOG_ZERO), log_mu.clamp(min=LOG_ZERO)
    p, m = log_pi.exp(), log_mu.exp()
    p_error, m_error = (x * (error + EXP2_ROUNDINGS * ROUNDING) for x, error in ((p, error_pi), (m, error_mu)))
    if kind == "tv":
        terms, errors = 0.5 * (m - p).abs(), 0.5 * (m_error + p_error)
    else:
        terms, difference = m * (log_mu - log_pi), (log_mu - log_pi).abs()
        # LOG_ZERO in units of log 2, the difference, the product, ln 2: one rounding each of what they are.
        rounded = ROUNDING * m * (2 * torch.maximum(log_mu.abs(), log_pi.abs()) + 3 * difference)
        errors = m_error * difference + m * (error_mu + error_pi) + rounded
    return terms.sum(1), (errors + SUM_ROUNDINGS * ROUNDING * terms.abs()).sum(1)


def log_probs(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, V] log-probs in float64, and what single precision makes of (x - max) / T - log_sum.

    The maximum is rounded as z and as x, the difference once, log2(e) / T twice and its product once; log_sum is rounded,
    its factor and their product too; the last difference once.
    """
    z = logits.double() / temperature
    top, log_sum = z.max(1, keepdim=True).values, z.logsumexp(1, keepdim=True)
    log_p = z - log_sum
    error = ROUNDING * (2 * top.abs() + 4 * (z - top).abs() + 3 * (log_sum - top) + log_p.abs())
    return log_p, error


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["tv", "kl"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    vocab=st.one_of(st.integers(6, 40), st.integers(1000, 5000)),
    padding=st.sampled_from([0, 5]),
    known=st.integers(0, 5),
    temperature=st.sampled_from([1.0, 0.7]),
    select=st.sampled_from(["all", "rows", "mask"]),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_definition(
    kind: str,
    dtype: torch.dtype,
    vocab: int,
    padding: int,
    known: int,
    temperature: float,
    select: str,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    temperature = float(torch.tensor(temperature))  # as the kernel knows it
    mu = (5 * torch.randn(4, vocab + padding, generator=g)).to(dtype)
    pi = (mu.float() + torch.randn(4, vocab + padding, generator=g)).to(dtype)
    mu[0, :vocab:3] = -torch.inf  # impossible under mu alone, under pi alone
    pi[1, 1:vocab:3] = -torch.inf
    mask = torch.tensor([True, True, False, True]) if select != "all" else torch.ones(4, dtype=torch.bool)
    rows = mask.nonzero()[:, 0]
    n, pi_true, mu_true = len(rows), pi[rows, :vocab], mu[rows, :vocab]
    hybrid = None
    if known:
        ids = torch.stack([torch.randperm(vocab, generator=g)[:known] for _ in range(n)])
        ids[torch.rand(ids.shape, generator=g) < 0.2] = -1
        share = 0.9 * torch.rand(ids.shape, generator=g) / known
        hybrid = (ids, share.log(), 2 * torch.rand(n, generator=g) - 1)
    per_row = (*normaliser(pi_true, temperature), *normaliser(mu_true, temperature), *(hybrid or (None,) * 3))
    pi[~mask] = mu[~mask] = torch.nan
    spread = []
    for values in per_row:
        if select == "mask" and values is not None:
            full = values.new_full((4, *values.shape[1:]), NO_ID if values.dtype == torch.int64 else math.nan)
            full[rows] = values
            values = full
        spread.append(values)
    selection = {"all": (None, None), "rows": (rows, None), "mask": (None, mask)}[select]
    got = operators.shard_divergence(pi, mu, *selection, *spread, kind, temperature, 0, vocab)
    if select == "mask":
        assert torch.equal(got[~mask], torch.zeros(1))
        got = got[mask]
    exact, error = expected_divergence(kind, pi_true, mu_true, temperature, hybrid)
    assert bool(((got - exact).abs() <= error).all())
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("inside", [[True, False, True], [True] * 3, [False] * 3])
@pytest.mark.parametrize("vocab", [50, 300_001])
def test_masked_rows_are_not_read_and_the_others_are_as_if_listed(inside: list[bool], vocab: int) -> None:
    torch.set_num_threads(2)
    whole, mask = arguments(3, vocab), torch.tensor(inside)
    rows = mask.nonzero()[:, 0]
    logits = ("logits", "rollout_logits")
    listed = {
        name: values[rows] if isinstance(values, torch.Tensor) and name not in logits else values
        for name, values in whole.items()
    }
    spoilt = dict(whole)
    for name, values in whole.items():
        if isinstance(values, torch.Tensor):
            spoilt[name] = values.clone()
            spoilt[name][~mask] = NO_ID if values.dtype == torch.int64 else math.nan
    got = operators.shard_divergence(**(spoilt | {"mask": mask}))
    assert torch.equal(got[mask], operators.shard_divergence(**(listed | {"rows": rows})))
    assert torch.equal(got[~mask], torch.zeros(int((~mask).sum())))


def arguments(n: int = 3, vocab: int = 50) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    pi, mu = torch.randn(2, n, vocab, generator=g)
    pi_max, pi_log_sum = normaliser(pi, 1.0)
    mu_max, mu_log_sum = normaliser(mu, 1.0)
    return {
        "logits": pi,
        "rollout_logits": mu,
        "rows": None,
        "mask": None,
        "max": pi_max,
        "log_sum": pi_log_sum,
        "rollout_max": mu_max,
        "rollout_log_sum": mu_log_sum,
        "known_ids": torch.tensor([[3, 49, -1]] * n),
        "known_log_prob": torch.full((n, 3), -2.0),
        "log_rescale": torch.full((n,), -0.3),
        "distance": "kl",
        "temperature": 1.0,
        "first_column": 0,
        "num_columns": vocab,
    }


def known_of(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return call["known_ids"], call["known_log_prob"], call["log_rescale"]


def test_shards_add_up_to_the_whole() -> None:
    whole = arguments()
    parts = 0
    for first in (0, 20, 40):
        last = min(first + 20, 50)
        cut = {name: whole[name][:, first:last].contiguous() for name in ("logits", "rollout_logits")}
        parts = parts + operators.shard_divergence(
            **(whole | cut | {"first_column": first, "num_columns": last - first})
        )
    _, error = expected_divergence("kl", whole["logits"], whole["rollout_logits"], 1.0, known_of(whole))
    # Three more roundings: of each shard's sum, and of adding them.
    allowed = 2 * error + 3 * ROUNDING * parts.abs()
    assert bool(((parts - operators.shard_divergence(**whole)).abs() <= allowed).all())


def test_a_long_row_is_split_over_threads() -> None:
    torch.set_num_threads(2)
    long = arguments(1, 300_001)
    exact, error = expected_divergence("kl", long["logits"], long["rollout_logits"], 1.0, known_of(long))
    assert bool(((operators.shard_divergence(**long) - exact).abs() <= error).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout_logits": torch.zeros(3, 49)}, "rollout_logits must match logits"),
        ({"rollout_logits": torch.zeros(3, 50, dtype=torch.bfloat16)}, "rollout_logits must match logits"),
        ({"rollout_logits": torch.zeros(50, 3).t()}, "rollout_logits must have contiguous columns"),
        ({"rows": torch.tensor([3])}, "rows holds 3"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, "mask must have shape"),
        ({"rows": torch.arange(3), "mask": torch.ones(3, dtype=torch.bool)}, "rows and mask exclude each other"),
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
