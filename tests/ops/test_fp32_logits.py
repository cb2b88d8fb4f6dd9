"""16-bit hidden states and weight give the logits of an fp32 product, and its gradients: as logits, and fused."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo.ops import fp32_product, linear_tiles
from megatron_dppo.ops.fp32_linear import fp32_linear
from megatron_dppo.ops.fused_linear import fused_linear_policy_stats
from tests.ops.fp32_products import WAYS, rounds_gradients
from tests.ops.tensor_sizes import TensorSizes

EPS = 2.0**-24  # half the distance of fp32 numbers near 1
HALF_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # at most, relative; on average 0.4 of it
DTYPES = st.sampled_from([torch.bfloat16, torch.float16])


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with WAYS[request.param]():
        yield request.param


def factors(n: int, h: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, h).to(dtype).requires_grad_(), torch.randn(width, h).to(dtype).requires_grad_()


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25)
@given(
    n=st.integers(0, 9),
    h=st.integers(1, 40),
    width=st.integers(1, 90),
    part=st.integers(1, 50),
    dtype=DTYPES,
    seed=st.integers(0, 2**20),
)
def test_logits_and_gradients_are_those_of_float64(
    way: str, n: int, h: int, width: int, part: int, dtype: torch.dtype, seed: int
) -> None:
    """Element by element. Sums of k fp32 products err by k roundings of their terms; a gradient is then rounded to its dtype.

    On CUDA each element of the logits' gradient is rounded before: a term of the sums by at most half a unit of itself, or of
    the smallest normal number. A processor may take two bf16 numbers for it: half a unit of what half a unit leaves.
    """
    torch.manual_seed(seed)
    hidden, weight = factors(n, h, width, dtype)
    grad = torch.randn(n, width)
    with mock.patch.object(fp32_product, "PART_BYTES", 4 * h * part), WAYS[way]():
        logits = fp32_linear(hidden, weight)
        gradients = torch.autograd.grad(logits, (hidden, weight), grad)
    a, b, g = hidden.detach().double(), weight.detach().double(), grad.double()
    assert logits.dtype is torch.float32
    assert ((logits.double() - a @ b.t()).abs() <= (h + 1) * EPS * (a.abs() @ b.abs().t())).all()

    half_unit = HALF_UNIT[dtype]
    first = half_unit if rounds_gradients(way) else HALF_UNIT[torch.bfloat16] ** 2 if way == "device" else 0.0
    smallest = torch.finfo(dtype).smallest_normal if way != "upcast" else 0.0
    for ours, x, y in ((gradients[0], g, b), (gradients[1], g.t(), a)):
        exact, terms = x @ y, x.abs() @ y.abs()
        before = (first + (x.shape[1] + 1) * EPS) * terms + half_unit * smallest * torch.ones_like(x) @ y.abs()
        allowed = before + half_unit * (exact.abs() + before) + half_unit * torch.finfo(dtype).smallest_normal
        assert ours.dtype is dtype
        assert ((ours.double() - exact).abs() <= allowed).all()


def statistics(
    logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, vocab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """([n] log-probs, [n] entropies) at temperature 0.7, in the logits' dtype: the definition."""
    log_p = (logits[:, :vocab] / 0.7).log_softmax(-1)
    log_prob = log_p.gather(-1, target[:, None])[:, 0]
    return torch.where(mask, log_prob, 0.0), torch.where(mask, -(log_p.exp() * log_p).sum(-1), 0.0)


def with_gradients(
    stats: tuple[torch.Tensor, torch.Tensor], leaves: tuple[torch.Tensor, torch.Tensor]
) -> list[torch.Tensor]:
    """[log-probs, entropies, gradient of the hidden states, of the weight] in float64, for random incoming gradients."""
    g1, g2 = torch.randn(2, len(stats[0]), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((g1 * stats[0] + g2 * stats[1]).sum(), leaves)
    return [values.detach().double() for values in (*stats, *gradients)]


@settings(max_examples=15)
@given(
    n=st.integers(40, 80),
    h=st.integers(16, 70),
    width=st.integers(100, 700),
    tile_rows=st.integers(10, 80),
    tile_columns=st.integers(16, 700),
    dtype=DTYPES,
    way=st.sampled_from(list(WAYS)),
    seed=st.integers(0, 2**20),
)
def test_fused_statistics_and_gradients_are_those_of_float64(
    n: int, h: int, width: int, tile_rows: int, tile_columns: int, dtype: torch.dtype, way: str, seed: int
) -> None:
    """Root mean squares, whatever the tiling, as logits and fused.

    Statistics err as PyTorch's do with fp32 factors. A gradient errs by one rounding to its dtype, at most half a unit of
    itself; on CUDA the logits' gradient is rounded too, and independent errors add up in squares.
    """
    torch.manual_seed(seed)
    hidden, weight = factors(n, h, width, dtype)
    tokens = {"target": torch.randint(0, width - 5, (n,)), "mask": torch.rand(n) < 0.7, "vocab": width - 5}

    def by_pytorch(exact: torch.dtype) -> list[torch.Tensor]:
        leaves = hidden.detach().to(exact).requires_grad_(), weight.detach().to(exact).requires_grad_()
        return with_gradients(statistics(leaves[0] @ leaves[1].t(), **tokens), leaves)

    truth, theirs = by_pytorch(torch.float64), by_pytorch(torch.float32)
    with (
        mock.patch.object(linear_tiles, "_MIN_COLUMNS", tile_columns),
        mock.patch.object(fp32_product, "PART_BYTES", 4 * h * 33),
        WAYS[way](),
    ):
        stats = fused_linear_policy_stats(
            hidden,
            weight,
            tokens["target"],
            token_mask=tokens["mask"],
            vocab_size=tokens["vocab"],
            temperature=0.7,
            fp32_logits=True,
            chunk_bytes=tile_rows * tile_columns * 4,
        )
        fused = with_gradients((stats.log_prob, stats.entropy), (hidden, weight))
        logits = with_gradients(statistics(fp32_linear(hidden, weight), **tokens), (hidden, weight))
    roundings = 2 if rounds_gradients(way) else 1
    for ours in (fused, logits):
        for index, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
            error, allowed, size = (x.square().mean().sqrt() for x in (a - c, b - c, c))
            rounded = roundings**0.5 * HALF_UNIT[dtype] if index >= 2 else 0.0
            assert error <= 2 * allowed + (rounded + 8 * EPS) * size


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", ["logits", "fused"])
def test_the_weights_gradient_is_added_to_main_grad_in_its_precision(
    way: str, route: str, main_dtype: torch.dtype
) -> None:
    """On top of what is there, and with no rounding to 16 bits on the way but that of the logits' gradient on CUDA."""
    hidden, weight = factors(60, 24, 40, torch.bfloat16)
    target, everything = torch.randint(0, 40, (60,)), torch.ones(60, dtype=torch.bool)
    before = torch.randn(40, 24).to(main_dtype)
    weight.main_grad, weight.grad_added_to_main_grad = before.clone(), False
    if route == "logits":
        log_prob, _ = statistics(fp32_linear(hidden, weight, accumulate_into_main_grad=True), target, everything, 40)
    else:
        log_prob = fused_linear_policy_stats(
            hidden,
            weight,
            target,
            temperature=0.7,
            fp32_logits=True,
            accumulate_into_main_grad=True,
            chunk_bytes=4 * 500,
        ).log_prob
    log_prob.sum().backward()
    assert weight.grad_added_to_main_grad
    assert not weight.grad.any()

    exact = weight.detach().double().requires_grad_()
    log_prob, _ = statistics(hidden.detach().double() @ exact.t(), target, everything, 40)
    (truth,) = torch.autograd.grad(log_prob.sum(), exact)
    # Relative to the norm: fp32 arithmetic (four rows of sums of at most 60 terms), then the roundings that there are.
    allowed = (4 * 60**0.5 * 2 * EPS + (HALF_UNIT[torch.bfloat16] if rounds_gradients(way) else 0.0)) * truth.norm()
    if main_dtype is torch.bfloat16:
        allowed += HALF_UNIT[torch.bfloat16] * weight.main_grad.double().norm()
    else:
        allowed += 2 * EPS * before.double().norm()
    assert (weight.main_grad.double() - before.double() - truth).norm() <= allowed


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_no_gradient(frozen: str) -> None:
    hidden, weight = factors(5, 8, 20, torch.bfloat16)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    fp32_linear(hidden, weight).sum().backward()
    assert [tensor.grad is None for tensor in (hidden, weight)] == [frozen == "hidden", frozen == "weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_changes_nothing_where_logits_are_not_rounded_anyway(dtype: torch.dtype) -> None:
    hidden, weight = factors(13, 24, 40, dtype)
    target = torch.randint(0, 40, (13,))
    plain, wide = (
        fused_linear_policy_stats(hidden, weight, target, fp32_logits=fp32_logits, chunk_bytes=500)
        for fp32_logits in (False, True)
    )
    for a, b in zip(
        with_gradients((plain.log_prob, plain.entropy), (hidden, weight)),
        with_gradients((wide.log_prob, wide.entropy), (hidden, weight)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_fused_ones_memory_stays_within_a_tile(way: str) -> None:
    """No tensor is larger but the weight and its gradient; the weight is never upcast as a whole."""
    hidden, weight = factors(64, 16, 4096, torch.bfloat16)
    target, tile = torch.randint(0, 4000, (64,)), 64 * 128 * 4
    with TensorSizes() as results, mock.patch.object(fp32_product, "PART_BYTES", tile):
        stats = fused_linear_policy_stats(
            hidden, weight, target, vocab_size=4000, fp32_logits=True, chunk_bytes=tile, backend="torch", checks="off"
        )
        (stats.log_prob.sum() + stats.entropy.sum()).backward()
    assert {shape for shape, size in results.largest.items() if size > tile} == {(4096, 16), (16, 4096)}
    assert results.largest[4096, 16] == weight.nbytes


def test_the_logits_gradient_is_copied_in_small_parts(way: str) -> None:
    hidden, weight = factors(64, 16, 4096, torch.bfloat16)
    with mock.patch.object(fp32_product, "PART_BYTES", 4 * 16 * 128):
        logits = fp32_linear(hidden, weight)
        gradient = torch.ones_like(logits)
        with TensorSizes() as results:
            torch.autograd.grad(logits, (hidden, weight), gradient)
    assert max(size for shape, size in results.largest.items() if 64 in shape) <= logits.nbytes // 8
