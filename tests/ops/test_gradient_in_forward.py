"""A policy gradient made in forward is the one that two passes make, whatever the blocks; and it is given out once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo import PolicyStats
from megatron_dppo.ops.fused_linear import fused_linear_policy_stats
from megatron_dppo.ops.gradient_in_forward import zero_with_policy_gradient
from megatron_dppo.ops.linear_call import CHUNK_BYTES
from megatron_dppo.ops.linear_route import rows_of_a_block
from tests.ops.linear_problem import problem
from tests.ops.tensor_sizes import TensorSizes

OTHERS: dict[str, Any] = {
    "tp_group": None,
    "rows": None,
    "sequence_parallel": False,
    "reduce_hidden_grad": True,
    "accumulate_into_main_grad": False,
    "fp32_logits": False,
    "chunk_bytes": CHUNK_BYTES,
    "deterministic": "off",
    "checks": "now",
}
Result = tuple[list[torch.Tensor], list[torch.Tensor]]  # statistics, gradients


def coefficients(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def leaves(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [arguments[name].to(dtype, copy=True).requires_grad_() for name in ("hidden", "weight")]


def in_forward(arguments: dict[str, Any], block_rows: int, **more: Any) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
    """The zero, its leaves, and the statistics that the caller of every block got."""
    hidden, weight = leaves(arguments)
    seen = []

    def token_gradient(stats: PolicyStats, block: slice) -> torch.Tensor:
        seen.append(stats)
        return coefficients(arguments["target"].shape[0])[block].to(stats.log_prob)

    zero = zero_with_policy_gradient(
        **{**OTHERS, **arguments, "hidden": hidden, "weight": weight, **more},
        token_gradient=token_gradient,
        block_rows=block_rows,
    )
    return zero, [hidden, weight], seen


def in_two_passes(arguments: dict[str, Any], dtype: torch.dtype, **more: Any) -> Result:
    hidden, weight = leaves(arguments, dtype)
    stats = fused_linear_policy_stats(**{**arguments, "hidden": hidden, "weight": weight, **more})
    total = (coefficients(arguments["target"].shape[0]) * stats.log_prob).sum()
    return list(stats.detach()), list(torch.autograd.grad(total, (hidden, weight)))


@settings(max_examples=20)
@given(
    n=st.integers(1, 9),
    h=st.integers(1, 9),
    width=st.integers(1, 60),
    padding=st.integers(0, 50),
    k=st.sampled_from([0, 2]),
    block_rows=st.integers(1, 10),
    selection=st.sampled_from(["mask", "rows", "all"]),
    seed=st.integers(0, 2**20),
)
def test_every_block_size_gives_the_gradient_of_two_passes(
    n: int, h: int, width: int, padding: int, k: int, block_rows: int, selection: str, seed: int
) -> None:
    torch.manual_seed(seed)
    arguments = problem(n, h, width, max(1, width - padding), k, torch.float64) | {"backend": "torch"}
    if selection != "mask":
        arguments["token_mask"] = None
    if selection == "rows":
        arguments["rows"], arguments["hidden"] = torch.randperm(n + 3)[:n], torch.randn(n + 3, h, dtype=torch.float64)
    stats, expected = in_two_passes(arguments, torch.float64)
    zero, inputs, seen = in_forward(arguments, block_rows)
    assert zero == 0
    (3.0 * zero).backward()
    for index, whole in enumerate(stats):
        if whole is None:
            assert all(part[index] is None for part in seen)
            continue
        # float64: sums of at most 60 terms in another order.
        torch.testing.assert_close(torch.cat([part[index] for part in seen]), whole, rtol=1e-12, atol=1e-12)
    for leaf, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 3.0 * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fp32_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_less_accurate_than_two_passes(dtype: torch.dtype, fp32_logits: bool, backend: str) -> None:
    """Against float64 on the same inputs, in norm. Both round logits, their gradient and the result alike; two passes round
    the same sums in another order, so one error may be a little above the other by chance."""
    arguments = problem(200, 48, 700, 690, 0, dtype)
    _, exact = in_two_passes(arguments, torch.float64, backend="torch")
    _, theirs = in_two_passes(arguments, dtype, backend=backend, fp32_logits=fp32_logits)
    zero, inputs, _ = in_forward(arguments, 200, backend=backend, fp32_logits=fp32_logits)
    zero.backward()
    for leaf, other, truth in zip(inputs, theirs, exact, strict=True):
        error, allowed = (float((values.double() - truth).norm()) for values in (leaf.grad, other))
        assert error <= 1.1 * allowed + 4 * torch.finfo(torch.float32).eps * float(truth.norm())


def with_main_grad(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.nn.Parameter]:
    weight = torch.nn.Parameter(arguments["weight"].clone())
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(weight.shape), False
    return arguments["hidden"].clone().requires_grad_(), weight


def into_main_grad(
    hidden: torch.Tensor, weight: torch.nn.Parameter, arguments: dict[str, Any], scale: Any
) -> torch.Tensor:
    return zero_with_policy_gradient(
        **{
            **OTHERS,
            "backend": "auto",
            **arguments,
            "hidden": hidden,
            "weight": weight,
            "accumulate_into_main_grad": True,
        },
        token_gradient=lambda stats, block: coefficients(60)[block].to(stats.log_prob),
        block_rows=17,
        backward_scale=scale,
    )


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_two_micro_batches_add_to_main_grad_what_backward_was_promised_to_ask(scale: float) -> None:
    arguments = problem(60, 24, 40, 37, 0)
    _, (grad_hidden, grad_weight) = in_two_passes(arguments, torch.float32)
    hidden, weight = with_main_grad(arguments)
    for _ in range(2):
        weight.grad, weight.grad_added_to_main_grad = None, False  # as Megatron's hooks do
        (scale * into_main_grad(hidden, weight, arguments, scale)).backward()
        assert weight.grad_added_to_main_grad
        assert not weight.grad.any()
    # fp32 sums of at most 60 terms in another order.
    torch.testing.assert_close(weight.main_grad, 1.0 + 2 * scale * grad_weight, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(hidden.grad, 2 * scale * grad_hidden, rtol=1e-5, atol=1e-5 * scale)


def test_another_number_than_promised_is_an_error() -> None:
    arguments = problem(60, 24, 40, 37, 0)
    with pytest.raises(RuntimeError, match=r"another number than the promised backward_scale=1\.0"):
        (0.5 * into_main_grad(*with_main_grad(arguments), arguments, 1.0)).backward()
    with pytest.raises(ValueError, match="needs backward_scale"):
        into_main_grad(*with_main_grad(arguments), arguments, None)


def test_a_second_backward_is_an_error() -> None:
    zero, _, _ = in_forward(problem(), 13, backend="torch")
    zero.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time through a gradient that was made in forward"):
        zero.backward()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    arguments = problem()
    _, expected = in_two_passes(arguments, torch.float32, backend="torch")
    hidden, weight = leaves(arguments)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    zero_with_policy_gradient(
        **{**OTHERS, "backend": "torch", **arguments, "hidden": hidden, "weight": weight},
        token_gradient=lambda stats, block: coefficients(13)[block].to(stats.log_prob),
        block_rows=5,
    ).backward()
    for leaf, gradient in zip((hidden, weight), expected, strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-6)
        else:
            assert leaf.grad is None


def test_nothing_is_larger_than_a_block_but_the_weight_and_its_gradient() -> None:
    arguments = problem(64, 16, 4096, 4000, 0)
    block = 8 * 4096 * 4
    with TensorSizes() as results:
        in_forward(arguments, 8, backend="torch")[0].backward()
    assert {shape for shape, size in results.largest.items() if size > block} == {(4096, 16), (16, 4096)}


def route(n: int = 1000, *, width: int = 1000, dtype: torch.dtype = torch.bfloat16, **more: Any) -> int | None:
    """With room for 250 tokens of bf16 logits."""
    hidden, weight = torch.zeros(1, 4, dtype=dtype), torch.nn.Parameter(torch.zeros(width, 4, dtype=dtype))
    weight.main_grad = torch.zeros(width, 4, dtype=more.pop("main_dtype", torch.float32))
    common = {"fp32_logits": False, "accumulate_into_main_grad": True, "backward_scale": 1.0, "chunk_bytes": 500_000}
    return rows_of_a_block(hidden, weight, n, **{**common, **more})


def test_the_rule() -> None:
    assert route() == 250
    assert route(n=1001) == 201  # five blocks of about equal length
    assert route(n=100) == 100  # all in one
    assert route(fp32_logits=True) is None  # 125 are too few
    assert route(n=100, fp32_logits=True) == 100
    assert route(dtype=torch.float32, chunk_bytes=1_000_000, accumulate_into_main_grad=False) == 250
    assert route(chunk_bytes=None) == 1000
    assert route(n=0) is None
    with torch.no_grad():
        assert route() is None


@pytest.mark.parametrize(
    "place", [{"backward_scale": None}, {"accumulate_into_main_grad": False}, {"main_dtype": torch.bfloat16}]
)
def test_several_blocks_need_a_place_for_the_weights_gradient(place: dict[str, Any]) -> None:
    assert route(**place) is None
    in_one = None if "backward_scale" in place else 100
    assert route(n=100, **place) == in_one
