"""An output layer with ``deterministic="layout"`` is right: values and gradients of the usual way, in float64.

That they are the same bits in every layout is tested on ranks (tests/layouts/test_layout_bits.py). 150 tokens are two blocks,
and 300 of 310 columns three tiles, none of them full.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_dppo.ops import layout_products
from megatron_dppo.ops.fused_linear import fused_linear_policy_stats
from megatron_dppo.ops.gradient_in_forward import zero_with_policy_gradient
from megatron_dppo.ops.layout_linear import layout_linear
from megatron_dppo.ops.policy_stats import PolicyStats, vocab_parallel_policy_stats
from tests.ops.linear_problem import problem
from tests.ops.tensor_sizes import TensorSizes

N = 150


def arguments_of(selection: str) -> dict[str, Any]:
    """In float64; what is outside the mask or the rows is NaN."""
    arguments = problem(n=N, h=20, width=310, vocab=300, dtype=torch.float64)
    mask = arguments.pop("token_mask")
    if selection != "all":
        arguments["hidden"] = arguments["hidden"].masked_fill(~mask[:, None], torch.nan)
    if selection == "mask":
        arguments["token_mask"] = mask
    if selection == "rows":
        rows = mask.nonzero()[:, 0].flip(0)
        arguments |= {"rows": rows, "target": arguments["target"][rows], "topk_ids": arguments["topk_ids"][rows]}
    return arguments


def leaves(arguments: dict[str, Any], into_main_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight = (arguments[name].clone().requires_grad_() for name in ("hidden", "weight"))
    if into_main_grad:
        weight.main_grad = torch.full_like(weight, 2.0, requires_grad=False)
        weight.grad_added_to_main_grad = False
    return hidden, weight


def total(stats: PolicyStats) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    factors = torch.randn(2, stats.log_prob.numel(), generator=generator, dtype=torch.float64)
    return factors[0] @ stats.log_prob + factors[1] @ stats.entropy


@pytest.mark.parametrize("into_main_grad", [False, True])
@pytest.mark.parametrize("selection", ["all", "mask", "rows"])
def test_two_passes_give_the_usual_values_and_gradients(selection: str, into_main_grad: bool) -> None:
    arguments, found = arguments_of(selection), {}
    for deterministic in ("off", "layout"):
        hidden, weight = leaves(arguments, into_main_grad)
        stats = fused_linear_policy_stats(
            **{**arguments, "hidden": hidden, "weight": weight},
            accumulate_into_main_grad=into_main_grad,
            backend="torch",
            deterministic=deterministic,
        )
        total(stats).backward()
        assert not into_main_grad or weight.grad_added_to_main_grad
        gradient = weight.main_grad if into_main_grad else weight.grad
        found[deterministic] = [*(values.detach() for values in stats), hidden.grad, gradient]
    for ours, usual in zip(found["layout"], found["off"], strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-11, atol=1e-11)
        assert usual.any()


@pytest.mark.parametrize("into_main_grad", [False, True])
def test_a_layer_over_logits_gives_the_usual_values_and_gradients(into_main_grad: bool) -> None:
    arguments, found = arguments_of("all"), []
    common = {name: arguments[name] for name in ("topk_ids", "temperature", "vocab_size")}
    for is_layout in (False, True):
        hidden, weight = leaves(arguments, into_main_grad and is_layout)
        logits = (
            layout_linear(hidden, weight, accumulate_into_main_grad=into_main_grad)
            if is_layout
            else hidden @ weight.t()
        )
        total(vocab_parallel_policy_stats(logits, arguments["target"], backend="torch", **common)).backward()
        gradient = weight.main_grad - 2.0 if into_main_grad and is_layout else weight.grad
        found.append((logits.detach(), hidden.grad, gradient))
    for usual, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("selection", ["all", "mask", "rows"])
def test_a_gradient_made_in_forward_is_that_of_two_passes(selection: str) -> None:
    arguments = arguments_of(selection)
    n = len(arguments["target"])
    factors = torch.randn(n, dtype=torch.float64)
    if selection == "mask":
        factors *= arguments["token_mask"]
    seen = torch.zeros(n, dtype=torch.float64)

    def token_gradient(stats: PolicyStats, places: Any) -> torch.Tensor:
        seen[places] = stats.log_prob
        return factors[places]

    hidden, weight = leaves(arguments)
    others = {
        "tp_group": None,
        "rows": None,
        "token_mask": None,
        "sequence_parallel": False,
        "reduce_hidden_grad": True,
    }
    zero_with_policy_gradient(
        **{**others, **arguments, "hidden": hidden, "weight": weight},
        token_gradient=token_gradient,
        block_rows=7,
        accumulate_into_main_grad=False,
        fp32_logits=False,
        chunk_bytes=1,
        backend="torch",
        deterministic="layout",
        checks="now",
    ).backward()
    expected_hidden, expected_weight = leaves(arguments)
    stats = fused_linear_policy_stats(
        **{**arguments, "hidden": expected_hidden, "weight": expected_weight}, backend="torch", deterministic="layout"
    )
    (factors * stats.log_prob).sum().backward()
    for ours, theirs in (
        (hidden.grad, expected_hidden.grad),
        (weight.grad, expected_weight.grad),
        (seen, stats.log_prob),
    ):
        assert torch.equal(ours, theirs)
        assert ours.any()


def test_products_have_the_same_shape_for_any_number_of_tokens() -> None:
    """What a library's choice could depend on."""
    shapes = []
    for n in (1, 3, 128):
        arguments = arguments_of("all")
        hidden, weight = leaves({**arguments, "hidden": arguments["hidden"][:n]})
        with TensorSizes() as sizes:
            stats = fused_linear_policy_stats(
                hidden, weight, arguments["target"][:n], vocab_size=300, backend="torch", deterministic="layout"
            )
            total(stats).backward()
        shapes.append({shape for shape in sizes.largest if 20 in shape and len(shape) == 2} - {(n, 20)})
    rows, tile = layout_products.BLOCK_ROWS, 128
    assert shapes[0] == shapes[1] == shapes[2] | {(rows, 20)}
    assert (tile, 20) in shapes[0]


def test_no_token_is_no_gradient() -> None:
    arguments = arguments_of("all")
    hidden, weight = leaves({**arguments, "hidden": arguments["hidden"][:0]})
    stats = fused_linear_policy_stats(
        hidden, weight, arguments["target"][:0], vocab_size=300, backend="torch", deterministic="layout"
    )
    stats.log_prob.sum().backward()
    assert hidden.grad.shape == (0, 20)
    assert not weight.grad.any()
    assert layout_linear(hidden, weight).shape == (0, 310)
