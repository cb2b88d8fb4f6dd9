"""Policy statistics of whole logits: right values and gradients, nothing outside the mask touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo import vocab_parallel_policy_stats
from megatron_dppo.ops import torch_backend
from tests.ops.dense_statistics import dense, stats_of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_values_and_gradients_are_those_of_the_definition(
    dtype: torch.dtype, shape: tuple[int, ...], backend: str
) -> None:
    if dtype is torch.float64 and backend != "torch":
        pytest.skip("the kernels do not take float64")
    logits = (3 * torch.randn(*shape, 53)).to(dtype).requires_grad_()
    target, ids = torch.randint(0, 53, shape), torch.randint(0, 53, (*shape, 6))
    stats = stats_of(backend, logits, target, ids, temperature=0.8)
    exact = logits.detach().double().requires_grad_()
    expected = dense(exact, target, ids, 0.8)
    # 53 terms of fp32 sums, each within an ulp of its value: 1e-5 leaves an order of magnitude (fp64: 1e-13).
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    for ours, theirs in zip(stats, expected, strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=tolerance, atol=tolerance)
    g1, g2 = torch.randn(2, *shape)
    (grad,) = torch.autograd.grad((g1 * stats.log_prob + g2 * stats.entropy).sum(), logits)
    (expected_grad,) = torch.autograd.grad((g1 * expected.log_prob + g2 * expected.entropy).sum(), exact)
    rounded = torch.finfo(dtype).eps / 2  # the gradient is rounded to the logits' dtype once
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rounded + tolerance, atol=tolerance)
    assert not stats.collision.requires_grad
    assert not stats.topk_log_prob.requires_grad


# Four segments of each row on a GPU, whose last block merges them; rows that begin at odd places; vectors with a rest.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows_are_those_of_the_definition(dtype: torch.dtype, backend: str) -> None:
    vocab, temperature = 40_001, 0.8
    logits = (3 * torch.randn(3, vocab + 2)).to(dtype).requires_grad_()
    target, ids = torch.tensor([0, 20_000, vocab - 1]), torch.randint(0, vocab, (3, 2))
    stats = stats_of(backend, logits, target, ids, temperature=temperature, vocab_size=vocab)
    exact = logits.detach().double().requires_grad_()
    expected = dense(exact[:, :vocab], target, ids, temperature)
    # No sum has more than vocab / 16 additions in a row; their roundings add up like a random walk, of which four times the
    # typical length is allowed: that is the error of a sum, and of what is a sum's logarithm or scaled by one.
    sums = 4 * (vocab / 16) ** 0.5 * 2.0**-24
    for ours, theirs in zip(stats, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=sums, atol=sums)
    g1, g2 = torch.randn(2, 3)
    (grad,) = torch.autograd.grad((g1 * stats.log_prob + g2 * stats.entropy).sum(), logits)
    (expected_grad,) = torch.autograd.grad((g1 * expected.log_prob + g2 * expected.entropy).sum(), exact)
    rounded = torch.finfo(dtype).eps / 2
    # A probability's exponent, at most 30, is rounded before it is taken; log p + entropy may be nearly 0.
    torch.testing.assert_close(
        grad.double(),
        expected_grad,
        rtol=rounded + sums + 30 * 2.0**-24,
        atol=2 * sums * float(expected_grad.abs().max()),
    )


def test_gradcheck_in_float64() -> None:
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    target, mask = torch.tensor([1, 5, 0]), torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(
        lambda x: stats_of("torch", x, target, vocab_size=6, temperature=1.4, token_mask=mask)[:2], logits
    )


@pytest.mark.parametrize("offset", [-1e4, 70.0, 1e4])
def test_large_logits_lose_no_digits(offset: float, backend: str) -> None:
    """log_prob = x - LSE would be off by the rounding of the LSE: 4e-6 at 70, 1e-3 at 1e4."""
    # Multiples of 1/64, so that adding the offset is exact in fp32.
    logits = (torch.randint(-300, 300, (20, 31)) / 64 + offset).requires_grad_()
    target, ids = torch.randint(0, 31, (20,)), torch.randint(0, 31, (20, 3))
    stats = stats_of(backend, logits, target, ids)
    exact = logits.detach().double().requires_grad_()
    expected = dense(exact, target, ids)
    for ours, theirs in zip(stats, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=2e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(stats.log_prob.sum() + stats.entropy.sum(), logits)
    (expected_grad,) = torch.autograd.grad(expected.log_prob.sum() + expected.entropy.sum(), exact)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-6)


def test_near_certain_tokens_keep_the_digits_of_what_is_left(backend: str) -> None:
    """log pi = -1e-9 and its gradient 1e-9 vanish if 1 + sum is rounded before the logarithm."""
    logits = torch.tensor([[math.log(1e9), 0.0], [60.0, 0.0]], requires_grad=True)
    stats = stats_of(backend, logits, torch.zeros(2, dtype=torch.int64))
    expected = -torch.log1p((logits[:, 1] - logits[:, 0]).double().exp()).detach()
    torch.testing.assert_close(stats.log_prob.double(), expected, rtol=1e-5, atol=0)
    stats.log_prob.sum().backward()
    torch.testing.assert_close(logits.grad[:, 0].double(), -torch.expm1(expected), rtol=1e-5, atol=0)


def test_minus_infinity_means_no_probability(backend: str) -> None:
    logits = torch.randn(4, 9)
    logits[:, 2:5] = -math.inf
    logits.requires_grad_()
    target = torch.tensor([0, 1, 3, 8])  # token 3 is impossible
    stats = stats_of(backend, logits, target, torch.tensor([[2, 0]] * 4))
    expected = dense(logits.detach(), target, torch.tensor([[2, 0]] * 4))
    for ours, theirs in zip(stats, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    (stats.log_prob.sum() + stats.entropy.sum()).backward()
    assert bool(logits.grad.isfinite().all())
    assert not logits.grad[[0, 1, 3], 2:5].any()


def test_nan_is_not_hidden(backend: str) -> None:
    logits = torch.randn(2, 5)
    logits[0, 3] = math.nan
    log_prob = stats_of(backend, logits, torch.zeros(2, dtype=torch.int64)).log_prob
    assert log_prob.isnan().tolist() == [True, False]


def test_masked_rows_are_not_read_and_get_zero(backend: str) -> None:
    logits = torch.randn(2, 4, 6)
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    target = torch.randint(0, 6, (2, 4)).masked_fill(~mask, -100)
    logits[~mask] = math.nan
    logits.requires_grad_()
    stats = stats_of(backend, logits, target, target[..., None], token_mask=mask)
    (stats.log_prob.sum() + stats.entropy.sum()).backward()
    for values in (*stats, logits.grad):
        assert not values[~mask].any()
        assert bool(values[mask].isfinite().all())
    everything = stats_of(backend, logits.detach()[mask], target[mask])
    # Other rows lie elsewhere: the kernels may add the 6 terms of each sum in another order, which moves it by at most
    # 5 * 2^-24 of itself. Both parts of the entropy, log sum exp and the mean of z - max, are at most log 6.
    torch.testing.assert_close(stats.entropy[mask], everything.entropy, rtol=0, atol=2 * 6 * 2.0**-24 * math.log(6))


def test_padded_columns_are_not_vocabulary(backend: str) -> None:
    logits = torch.randn(5, 12)
    logits[:, 9:] = 100.0
    target = torch.randint(0, 9, (5,))
    padded = logits.clone().requires_grad_()
    stats = stats_of(backend, padded, target, vocab_size=9)
    for ours, theirs in zip(stats[:3], stats_of(backend, logits[:, :9], target)[:3], strict=True):
        assert torch.equal(ours, theirs)
    (stats.log_prob.sum() + stats.entropy.sum()).backward()
    assert not padded.grad[:, 9:].any()


@pytest.mark.parametrize("masked", [False, True])
def test_no_top_k_ids_give_no_top_k_log_probs(masked: bool, backend: str) -> None:
    logits, target = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    mask = torch.tensor([[True, False, True], [False, False, True]]) if masked else None
    stats = stats_of(backend, logits, target, torch.zeros(2, 3, 0, dtype=torch.int64), token_mask=mask)
    assert stats.topk_log_prob is not None
    assert stats.topk_log_prob.shape == (2, 3, 0)


def test_temporaries_are_bounded_whatever_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are worked through in chunks; a chunk boundary leaves no trace in the results."""
    logits, target = torch.randn(37, 50, requires_grad=True), torch.randint(0, 50, (37,))
    whole = stats_of("torch", logits, target)
    (whole_grad,) = torch.autograd.grad(whole.entropy.sum(), logits)
    monkeypatch.setattr(torch_backend, "TEMPORARY_BYTES", 5 * 3 * 4 * 50)
    chunks = list(torch_backend.row_chunks(37, 50, torch.float32))
    assert max(part.stop - part.start for part in chunks) == 5
    chunked = stats_of("torch", logits, target)
    assert torch.equal(whole.log_prob, chunked.log_prob)
    assert torch.equal(whole_grad, torch.autograd.grad(chunked.entropy.sum(), logits)[0])


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(1,), (9,), (2, 5), (3, 1)]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    k=st.sampled_from([None, 0, 3]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]),
    inplace=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_rows_and_a_mask_of_them_are_the_same(
    shape: tuple[int, ...], share: float, k: int | None, dtype: torch.dtype, inplace: bool, seed: int, backend: str
) -> None:
    """Bit for bit, values and gradients; nothing outside is read, though it is NaN there."""
    torch.manual_seed(seed)
    mask = torch.rand(shape) < share
    rows = mask.flatten().nonzero()[:, 0]
    source = torch.randn(*shape, 11).to(dtype)
    source[~mask] = math.nan
    target = torch.randint(0, 9, shape).masked_fill(~mask, -100)
    ids = None if k is None else torch.randint(0, 9, (*shape, k)).masked_fill(~mask[..., None], -100)
    common = {"vocab_size": 9, "temperature": 0.7, "inplace_backward": inplace, "backend": backend}
    results = []
    for selection in ({"token_mask": mask}, {"rows": rows}):
        leaf = source.clone().requires_grad_()
        logits = leaf * 1
        chosen_target, chosen_ids = target, ids
        if "rows" in selection:
            chosen_target = target.flatten()[rows]
            chosen_ids = None if ids is None else ids.flatten(0, -2)[rows]
        stats = vocab_parallel_policy_stats(logits, chosen_target, topk_ids=chosen_ids, **selection, **common)
        (stats.log_prob.sum() + 0.3 * stats.entropy.sum()).backward()
        results.append((stats, leaf.grad))
    (masked, masked_grad), (compact, compact_grad) = results
    for whole, part in zip(masked, compact, strict=True):
        assert (whole is None) == (part is None)
        if whole is not None:
            assert part.shape[0] == len(rows)
            assert torch.equal(whole[mask], part)
            assert not whole[~mask].any()
    assert torch.equal(masked_grad[mask], compact_grad[mask])
    # 0, but for autograd's own product with the NaN that the logits were made of.
    assert not masked_grad[~mask].any()
    assert not compact_grad[~mask].any()


def test_ids_that_are_not_checked_do_not_stop_the_call(backend: str) -> None:
    logits, target = torch.zeros(2, 5), torch.tensor([0, 9])
    stats = vocab_parallel_policy_stats(logits, target, backend=backend, checks="off")
    assert float(stats.log_prob[0]) == pytest.approx(-math.log(5))


WRONG_ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    r"target at \[1\] is \[9\]: ids must lie in \[0, 5\)": lambda: {"target": torch.tensor([0, 9])},
    r"target at \[1\] is \[5\]": lambda: {"target": torch.tensor([0, 5]), "vocab_size": 5},
    r"topk_ids at \[1\] is \[2, -1\]": lambda: {"topk_ids": torch.tensor([[0, 1], [2, -1]])},
    r"target has shape \(1,\)": lambda: {"target": torch.tensor([0])},
    "target must be torch.int64": lambda: {"target": torch.tensor([0, 1], dtype=torch.int32)},
    "token_mask must be torch.bool": lambda: {"token_mask": torch.ones(2)},
    r"target has shape \(2,\); logits \(2, 5\) ask for \(1,\) \(with rows\)": lambda: {"rows": torch.tensor([1])},
    r"rows must be \[n\] flat positions": lambda: {"rows": torch.tensor([[0, 1]])},
    "rows or token_mask, not both": lambda: {
        "rows": torch.tensor([0, 1]),
        "token_mask": torch.ones(2, dtype=torch.bool),
    },
    "temperature must be positive": lambda: {"temperature": 0.0},
    "vocab_size is 6, but 1 shard": lambda: {"vocab_size": 6},
    "logits must be": lambda: {"logits": torch.zeros(2, 5, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message: str) -> None:
    arguments = {"logits": torch.zeros(2, 5), "target": torch.tensor([0, 1]), **WRONG_ARGUMENTS[message]()}
    with pytest.raises(ValueError, match=message):
        vocab_parallel_policy_stats(**arguments, backend="torch")
