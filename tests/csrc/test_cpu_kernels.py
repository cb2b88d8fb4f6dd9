"""The compiled CPU kernels against float64: every output, the gradient, and the rows and columns they must not touch.

Tolerance: twice the error of the same formula in fp32 PyTorch (log_softmax, gather, autograd) on the same logits, plus
what that comparison can by luck leave at 0: the roundings of z = x / T, of its maximum and of the result, each half a
unit in the last place (2^-24 relative), of which no output sees more than 8; a 16-bit gradient adds its own rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("megatron_dppo.ops.native_backend", reason="the extension megatron_dppo._C is not built")
operators = torch.ops.megatron_dppo

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADIENT_ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NO_ID = -100
SMALLEST_HALF = 2.0**-24  # a half's results below this are absolute, not relative


class Problem(NamedTuple):
    logits: torch.Tensor
    target: torch.Tensor
    topk_ids: torch.Tensor
    mask: torch.Tensor
    vocab_size: int
    temperature: float
    grad_log_prob: torch.Tensor
    grad_entropy: torch.Tensor


class Results(NamedTuple):
    log_prob: torch.Tensor
    entropy: torch.Tensor
    collision: torch.Tensor
    topk_log_prob: torch.Tensor
    grad: torch.Tensor


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rows = draw(st.integers(1, 6))
    vocab_size = draw(st.one_of(st.integers(1, 80), st.integers(1000, 6000)))
    padding = draw(st.sampled_from([0, 1, 24]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 4.0, 20.0]))
    logits = torch.randn(rows, vocab_size + padding, generator=generator) * scale + draw(st.sampled_from([0.0, -50.0]))
    ids = torch.randint(0, vocab_size, (rows, 1 + draw(st.integers(1, 4))), generator=generator)
    coefficients = torch.randn(2, rows, generator=generator)
    return Problem(
        logits.to(draw(st.sampled_from(DTYPES))),
        ids[:, 0].contiguous(),
        ids[:, 1:].contiguous(),
        torch.rand(rows, generator=generator) < draw(st.sampled_from([0.5, 2.0])),
        vocab_size,
        draw(st.sampled_from([1.0, 0.7, 1.6])),
        coefficients[0],
        coefficients[1],
    )


def forward(p: Problem, rows: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """log_prob, entropy, collision, topk_log_prob, max, log_sum."""
    partials = operators.row_partials(p.logits, rows, mask, p.target, p.topk_ids, p.temperature, 0, p.vocab_size)
    return operators.merge_partials(partials[None], mask)


def backward_arguments(p: Problem, mask: torch.Tensor | None = None) -> tuple[Any, ...]:
    """All but the logits and the gradient."""
    log_prob, entropy, _, _, maximum, log_sum = forward(p, mask=mask)
    coefficients = (p.grad_log_prob, p.grad_entropy, p.temperature, 0, p.vocab_size)
    return (mask, p.target, maximum, log_sum, log_prob, entropy, *coefficients)


def compiled(p: Problem, inplace: bool = False) -> Results:
    log_prob, entropy, collision, topk_log_prob, _, _ = forward(p, mask=p.mask)
    arguments = backward_arguments(p, p.mask)
    logits = p.logits.clone()
    grad = logits if inplace else torch.full_like(logits, 7.0)
    if inplace:
        operators.policy_backward_(logits, *arguments)
    else:
        operators.policy_backward(logits, grad, *arguments)
        assert torch.equal(logits.nan_to_num(), p.logits.nan_to_num()), "the logits were written"
    return Results(log_prob, entropy, collision, topk_log_prob, grad)


def eager(p: Problem, dtype: torch.dtype) -> Results:
    logits = p.logits.to(dtype, copy=True).requires_grad_()
    log_p = torch.log_softmax(logits[:, : p.vocab_size] / p.temperature, dim=-1)
    probability = log_p.exp()
    log_prob = log_p.gather(1, p.target[:, None])[:, 0] * p.mask
    entropy = -(probability * log_p).sum(-1) * p.mask
    total = (log_prob * p.grad_log_prob).sum() + (entropy * p.grad_entropy).sum()
    (grad,) = torch.autograd.grad(total, logits)
    collision = probability.square().sum(-1) * p.mask
    topk = log_p.gather(1, p.topk_ids) * p.mask[:, None]
    return Results(*(value.detach() for value in (log_prob, entropy, collision, topk, grad)))


def assert_as_good_as_eager(p: Problem, got: Results) -> None:
    exact, single = eager(p, torch.float64), eager(p, torch.float32)
    largest_z = float(p.logits[:, : p.vocab_size].double().abs().max()) / p.temperature
    for name, value, want, other in zip(Results._fields, got, exact, single, strict=True):
        size = float(want.abs().max()) if want.numel() else 0.0
        # Relative in the probabilities, absolute in their logarithms: an error of z scales a probability or gradient.
        floor = 8 * 2.0**-24 * (largest_z + 1) * (size if name in ("collision", "grad") else 1) + 8 * 2.0**-24 * size
        tolerance = (2 * (other.double() - want).abs().max() if want.numel() else 0.0) + floor
        rounding = GRADIENT_ROUNDING[p.logits.dtype] * want.abs() + SMALLEST_HALF if name == "grad" else 0.0
        assert bool(((value.double() - want).abs() <= tolerance + rounding).all()), name


@settings(max_examples=80)
@given(problems())
def test_statistics_and_gradient_are_as_good_as_eager_fp32(problem: Problem) -> None:
    got = compiled(problem)
    assert_as_good_as_eager(problem, got)
    assert bool((got.grad[:, problem.vocab_size :] == 0).all()), "padding got a gradient"
    assert bool((got.grad[~problem.mask] == 0).all()), "a masked row got a gradient"


def make_problem(rows: int, columns: int, dtype: torch.dtype = torch.float32, topk: int = 2) -> Problem:
    return Problem(
        (torch.randn(rows, columns) * 3).to(dtype),
        torch.randint(0, columns, (rows,)),
        torch.randint(0, columns, (rows, topk)),
        torch.ones(rows, dtype=torch.bool),
        columns,
        1.0,
        torch.randn(rows),
        torch.randn(rows),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_long_row_is_split_over_threads(dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    problem = make_problem(1, 200_003, dtype)
    assert_as_good_as_eager(problem, compiled(problem))


@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 2047, 2048, 2049, 4096])
def test_widths_around_a_chunk(columns: int) -> None:
    problem = make_problem(2, columns)
    assert_as_good_as_eager(problem, compiled(problem))


def test_no_rows() -> None:
    problem = make_problem(0, 10)
    assert [tuple(value.shape) for value in compiled(problem)] == [(0,), (0,), (0,), (0, 2), (0, 10)]


@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0])
@pytest.mark.parametrize("columns", [2, 2047, 3000, 49152])
def test_near_certainty_keeps_the_digits_of_one_minus_p(gap: float, columns: int) -> None:
    """``1 + rest`` would have lost every digit of the rest at a gap of 20.

    Tolerance, relative: exp2 is good to 2e-7; its argument is the gap times log2(e), a constant and a product that are
    rounded (2^-24 each), which scales the rest by e to the gap times that; and the sum's 24 roundings of 2^-24 (kChunk in
    csrc/cpu/row_partials.cpp), whatever the row's length and the processor. log1p and what follows: 2^-23.
    """
    logits = torch.full((1, columns), -gap)
    at = 1234 % columns
    logits[0, at] = 0.0
    partials = operators.row_partials(logits, None, None, torch.tensor([at]), None, 1.0, 0, columns)
    log_prob = operators.merge_partials(partials[None], None)[0]
    rest = (columns - 1) * torch.tensor(-gap, dtype=torch.float64).exp()
    tolerance = 2e-7 + 2 * gap * 2.0**-24 + 24 * 2.0**-24 + 2.0**-23
    assert float(log_prob) == pytest.approx(-float(rest.log1p()), rel=tolerance)


def test_equal_maxima_all_count() -> None:
    problem = make_problem(1, 5000)._replace(logits=torch.zeros(1, 5000))
    log_prob, entropy, collision, *_ = forward(problem)
    torch.testing.assert_close(log_prob, -torch.tensor([5000.0]).log())
    torch.testing.assert_close(entropy, torch.tensor([5000.0]).log())
    torch.testing.assert_close(collision, torch.tensor([1 / 5000.0]))


def test_columns_at_minus_infinity_have_no_probability_and_no_gradient() -> None:
    problem = make_problem(3, 5000)
    excluded = torch.rand(3, 5000) < 0.5
    excluded[0, :4096] = True  # whole chunks of them, the first one too
    excluded[torch.arange(3), problem.target] = False
    excluded.scatter_(1, problem.topk_ids, False)
    got = compiled(problem._replace(logits=problem.logits.masked_fill(excluded, -torch.inf)))
    # -1e4 is as far as fp32 can tell, and unlike -inf the eager formula can take it.
    assert_as_good_as_eager(problem._replace(logits=problem.logits.masked_fill(excluded, -1e4)), got._replace())
    assert bool((got.grad[excluded] == 0).all())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 2500, 4999])
@pytest.mark.parametrize("others", [1.0, -torch.inf])
def test_a_row_without_a_softmax_is_nan_and_harms_no_other(poison: float, column: int, others: float) -> None:
    problem = make_problem(2, 5000)
    clean = compiled(problem)
    logits = problem.logits.clone()
    logits[0] += others
    logits[0, column] = poison
    got = compiled(problem._replace(logits=logits))
    for value in got[:3]:
        assert bool(value[0].isnan())
    assert bool(got.grad[0].isnan().all())
    for value, expected in zip(got, clean, strict=True):
        torch.testing.assert_close(value[1], expected[1], rtol=0, atol=0)


MASKS = {"some": [True, False, True, True, False], "all": [True] * 5, "none": [False] * 5}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inside", MASKS)
@pytest.mark.parametrize("columns", [3000, 200_003], ids=["whole rows", "rows in segments"])
def test_masked_rows_are_not_read_and_the_others_are_as_if_listed(
    dtype: torch.dtype, inside: str, columns: int
) -> None:
    torch.set_num_threads(2)
    problem, mask = make_problem(5, columns, dtype), torch.tensor(MASKS[inside])
    rows = mask.nonzero()[:, 0]
    listed = problem._replace(target=problem.target[rows], topk_ids=problem.topk_ids[rows])
    spoilt = problem._replace(
        logits=problem.logits.masked_fill(~mask[:, None], torch.nan),
        target=problem.target.masked_fill(~mask, NO_ID),
        topk_ids=problem.topk_ids.masked_fill(~mask[:, None], NO_ID),
        grad_log_prob=problem.grad_log_prob.masked_fill(~mask, torch.nan),
        grad_entropy=problem.grad_entropy.masked_fill(~mask, torch.nan),
    )
    for values, expected in zip(forward(spoilt, mask=mask), forward(listed, rows=rows), strict=True):
        assert torch.equal(values[mask], expected)
        assert torch.equal(values[~mask], torch.zeros_like(values[~mask]))
    whole = problem._replace(logits=problem.logits[rows], grad_log_prob=problem.grad_log_prob[rows])
    whole = whole._replace(target=listed.target, topk_ids=listed.topk_ids, grad_entropy=problem.grad_entropy[rows])
    expected_grad = compiled(whole._replace(mask=torch.ones(len(rows), dtype=torch.bool))).grad
    mask_and_target, coefficients = (mask, spoilt.target), (spoilt.grad_log_prob, spoilt.grad_entropy, 1.0, 0, columns)
    log_prob, entropy, _, _, maximum, log_sum = (
        values.index_fill(0, (~mask).nonzero()[:, 0], torch.nan) for values in forward(spoilt, mask=mask)
    )
    arguments = (*mask_and_target, maximum, log_sum, log_prob, entropy, *coefficients)
    grad = torch.full_like(spoilt.logits, 7.0)
    operators.policy_backward(spoilt.logits, grad, *arguments)
    assert torch.equal(grad[mask], expected_grad)
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
    operators.policy_backward_(spoilt.logits, *arguments)
    assert torch.equal(spoilt.logits, grad)


def test_partials_of_masked_rows_are_zero() -> None:
    problem, mask = make_problem(5, 100), torch.tensor(MASKS["some"])
    partials = operators.row_partials(problem.logits, None, mask, problem.target, problem.topk_ids, 1.0, 0, 100)
    assert torch.equal(partials[~mask], torch.zeros(2, 7))
    assert bool((partials[mask] != 0).any(dim=1).all())


def test_a_row_that_nothing_flows_back_through_is_zero_filled_without_being_read() -> None:
    problem = make_problem(3, 100)
    problem.grad_log_prob[1] = problem.grad_entropy[1] = 0.0
    arguments = backward_arguments(problem)
    grad = torch.full_like(problem.logits, 7.0)
    problem.logits[1] = torch.nan
    operators.policy_backward(problem.logits, grad, *arguments)
    assert bool((grad[1] == 0).all())
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_gradient_is_the_fp32_one_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    problem = make_problem(4, 4099, dtype)
    in_single = compiled(problem._replace(logits=problem.logits.float()))
    assert torch.equal(compiled(problem).grad, in_single.grad.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gives_the_same_bits(dtype: torch.dtype) -> None:
    problem = make_problem(4, 1001, dtype)
    assert torch.equal(compiled(problem, inplace=True).grad, compiled(problem).grad)


def test_rows_may_lie_apart_and_unaligned() -> None:
    problem = make_problem(4, 1001, torch.bfloat16)
    wide = torch.full((4, 1019), torch.nan, dtype=torch.bfloat16)
    wide[:, 3:1004] = problem.logits
    arguments = (None, None, problem.target, problem.topk_ids, 1.0, 0, 1001)
    expected = operators.row_partials(problem.logits, *arguments)
    assert torch.equal(operators.row_partials(wide[:, 3:1004], *arguments), expected)


def test_shards_merge_to_the_whole() -> None:
    problem = make_problem(5, 3001)._replace(temperature=0.7)
    parts = [
        operators.row_partials(
            *(part.contiguous(), None, None, problem.target, problem.topk_ids, 0.7),
            *(1000 * i, max(0, min(1000, 3001 - 1000 * i))),
        )
        for i, part in enumerate(torch.nn.functional.pad(problem.logits, (0, 1999)).split(1000, dim=1))
    ]
    for together, alone in zip(operators.merge_partials(torch.stack(parts), None), forward(problem), strict=True):
        # Two ways to round the same sums: a few units in the last place of numbers below 32.
        torch.testing.assert_close(together, alone, rtol=2e-6, atol=8e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, "logits must be a matrix"),
        ({"logits": torch.zeros(4, 2).t()}, "logits must have contiguous columns"),
        ({"logits": torch.zeros(2, 4, dtype=torch.float64)}, "logits must be float32, bfloat16 or float16"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "target must have shape"),
        ({"target": torch.zeros(2, dtype=torch.int32)}, "target must be Long"),
        ({"topk_ids": torch.zeros(2, dtype=torch.int64)}, "topk_ids must be a matrix"),
        ({"topk_ids": torch.zeros(2, 6, dtype=torch.int64)[:, ::2]}, "topk_ids must be contiguous"),
        ({"rows": torch.zeros(5, dtype=torch.int64)}, "rows lists 5 rows"),
        ({"rows": torch.tensor([0, 2])}, "rows holds 2"),
        ({"mask": torch.ones(2)}, "mask must be Bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask must have shape"),
        ({"rows": torch.tensor([0, 1]), "mask": torch.ones(2, dtype=torch.bool)}, "rows and mask exclude each other"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"num_columns": 5}, "num_columns must be in"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "logits": torch.zeros(2, 4),
        "rows": None,
        "mask": None,
        "target": torch.zeros(2, dtype=torch.int64),
        "topk_ids": None,
        "temperature": 1.0,
        "first_column": 0,
        "num_columns": 4,
    }
    with pytest.raises(ValueError, match=message):
        operators.row_partials(**(arguments | change))


def test_a_gradient_that_overlaps_the_logits_is_refused() -> None:
    problem = make_problem(3, 100)
    memory = torch.zeros(400)
    arguments = backward_arguments(problem)
    with pytest.raises(ValueError, match="grad must be the logits themselves or share no memory"):
        operators.policy_backward(memory[:300].view(3, 100), memory[100:].view(3, 100), *arguments)


def test_operators_describe_themselves_to_the_compiler() -> None:
    problem = make_problem(3, 50)
    arguments = backward_arguments(problem)
    checks = ("test_schema", "test_faketensor")
    partial_arguments = (problem.logits, None, problem.mask, problem.target, problem.topk_ids, 1.0, 0, 50)
    torch.library.opcheck(operators.row_partials.default, partial_arguments, test_utils=checks)
    partials = operators.row_partials(*partial_arguments)[None]
    torch.library.opcheck(operators.merge_partials.default, (partials, problem.mask), test_utils=checks)
    grad = torch.empty_like(problem.logits)
    torch.library.opcheck(operators.policy_backward.default, (problem.logits, grad, *arguments), test_utils=checks)
    torch.library.opcheck(operators.policy_backward_.default, (problem.logits, *arguments), test_utils=checks)


def test_a_graph_captured_by_torch_compile_gives_the_same() -> None:
    problem = make_problem(3, 50)

    def statistics(logits: torch.Tensor) -> torch.Tensor:
        partials = operators.row_partials(logits, None, problem.mask, problem.target, None, 1.0, 0, 50)
        return operators.merge_partials(partials[None], problem.mask)[1]

    captured = torch.compile(statistics, backend="eager", fullgraph=True)
    assert torch.equal(captured(problem.logits), statistics(problem.logits))
