"""Statistics from hidden states and weight are those of the logits, as are the gradients, whatever the tiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo import PolicyStats, vocab_parallel_policy_stats
from megatron_dppo.ops import linear_tiles, torch_backend
from megatron_dppo.ops.arguments import RowSelection, TokenIds, VocabShard
from megatron_dppo.ops.fused_linear import fused_linear_policy_stats
from megatron_dppo.ops.shard_merge import merge_chunks
from tests.ops.linear_problem import problem
from tests.ops.tensor_sizes import TensorSizes

Gradients = tuple[torch.Tensor, torch.Tensor]


def incoming(shape: torch.Size) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2)]


def with_gradients(stats: PolicyStats, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[PolicyStats, Gradients]:
    g1, g2 = incoming(stats.log_prob.shape)
    total = (g1 * stats.log_prob + g2 * stats.entropy).sum()
    return stats, torch.autograd.grad(total, (hidden, weight))


def fused(arguments: dict[str, Any], **kw: Any) -> tuple[PolicyStats, Gradients]:
    hidden, weight = (arguments[name].clone().requires_grad_() for name in ("hidden", "weight"))
    stats = fused_linear_policy_stats(**{**arguments, "hidden": hidden, "weight": weight, **kw})
    return with_gradients(stats, hidden, weight)


def unfused(arguments: dict[str, Any], backend: str = "torch") -> tuple[PolicyStats, Gradients]:
    hidden, weight = (arguments[name].clone().requires_grad_() for name in ("hidden", "weight"))
    others = {name: value for name, value in arguments.items() if name not in ("hidden", "weight")}
    stats = vocab_parallel_policy_stats(hidden @ weight.t(), **others, backend=backend)
    return with_gradients(stats, hidden, weight)


def eager(arguments: dict[str, Any], dtype: torch.dtype) -> tuple[PolicyStats, Gradients]:
    """The definition, with the matrix product in ``dtype`` and everything after it in fp32 (fp64 for fp64)."""
    hidden, weight = (arguments[name].to(dtype).requires_grad_() for name in ("hidden", "weight"))
    logits = (hidden @ weight.t())[..., : arguments["vocab_size"]]
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    log_p = (logits.to(exact) / arguments["temperature"]).log_softmax(-1)
    p, mask = log_p.exp(), arguments["token_mask"]
    log_prob, entropy, collision = (
        torch.where(mask, values, 0.0)
        for values in (
            log_p.gather(-1, arguments["target"][..., None])[..., 0],
            -(p * log_p).sum(-1),
            p.square().sum(-1),
        )
    )
    topk = None
    if arguments["topk_ids"] is not None:
        topk = torch.where(mask[..., None], log_p.gather(-1, arguments["topk_ids"]), 0.0)
    return with_gradients(PolicyStats(log_prob, entropy, collision, topk), hidden, weight)


def tensors(result: tuple[PolicyStats, Gradients]) -> list[torch.Tensor]:
    stats, gradients = result
    return [values.detach().double() for values in (*stats, *gradients) if values is not None]


@settings(max_examples=25)
@given(
    n=st.integers(0, 5),
    h=st.integers(1, 9),
    width=st.one_of(st.integers(1, 20), st.integers(130, 300)),
    padding=st.integers(0, 150),
    k=st.sampled_from([0, 1, 20]),
    tile=st.one_of(st.integers(5, 50), st.integers(130, 1500)),
    min_columns=st.sampled_from([1, 32, 4096]),
    seed=st.integers(0, 2**20),
)
def test_every_tiling_gives_the_definition(
    n: int, h: int, width: int, padding: int, k: int, tile: int, min_columns: int, seed: int
) -> None:
    """Tiles from a few logits to all of them, with and without a remainder, chunks of padding only."""
    torch.manual_seed(seed)
    arguments = problem(n, h, width, max(1, width - padding), k, torch.float64)
    with mock.patch.object(linear_tiles, "_MIN_COLUMNS", min_columns):
        ours, truth = fused(arguments, backend="torch", chunk_bytes=8 * tile), eager(arguments, torch.float64)
    for a, b in zip(tensors(ours), tensors(truth), strict=True):
        # At most 300 terms of order 1 to 10, each rounded to 1e-16 of itself, in sums whose errors add up like their roots.
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.emulated_nightly
@settings(max_examples=20)
@given(
    n=st.integers(40, 80),
    h=st.integers(16, 70),
    width=st.integers(100, 700),
    tile_rows=st.integers(10, 80),
    tile_columns=st.integers(16, 700),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**20),
)
def test_no_less_accurate_than_pytorch(
    n: int, h: int, width: int, tile_rows: int, tile_columns: int, dtype: torch.dtype, seed: int, backend: str
) -> None:
    """The error, against float64 on the same inputs, is at most twice that of the same formulation by PyTorch.

    Root mean squares: what the roundings do to a single element is chance. The only roundings that PyTorch does not make
    are those of the hidden gradient's parts, one for each chunk of columns; they are of different columns, so they add up
    in squares to about one rounding of the whole. In fp32 both errors are a few roundings of the arithmetic, in another
    order; as many are granted (nothing next to the roundings of the shorter types).
    """
    torch.manual_seed(seed)
    arguments = problem(n, h, width, width - 5, 20, dtype)
    exact, theirs = eager(arguments, torch.float64), eager(arguments, dtype)
    with mock.patch.object(linear_tiles, "_MIN_COLUMNS", tile_columns):
        ours = fused(arguments, backend=backend, chunk_bytes=tile_rows * tile_columns * dtype.itemsize)
    for a, b, truth in zip(tensors(ours), tensors(theirs), tensors(exact), strict=True):
        error, allowed, size = (x.square().mean().sqrt() for x in (a - truth, b - truth, truth))
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_route_over_logits(dtype: torch.dtype, backend: str) -> None:
    arguments = problem(50, 64, 640, 600, 20, dtype)
    expected = unfused(arguments, backend)
    for tiles in (1, 5):
        got = tensors(fused(arguments, backend=backend, chunk_bytes=50 * 640 // tiles * dtype.itemsize))
        for a, b in zip(got, tensors(expected), strict=True):
            assert (a - b).norm() <= _other_order(dtype, tiles) * b.norm()


def _other_order(dtype: torch.dtype, tiles: int) -> float:
    """How far the norm of a matrix product, and of what follows, moves if its terms are added in another order.

    fp32: at most 640 terms in each of a row of four sums (logits, softmax, gradient, product). bf16: a result is rounded
    once there and after each of the tiles here; what fp32 leaves is nothing next to it. Roundings are independent.
    """
    if dtype is torch.float32:
        return 4 * 640**0.5 * 2.0**-24
    return (1 + tiles) ** 0.5 * 2.0**-9


def test_gradcheck() -> None:
    arguments = problem(4, 5, 9, 8, 0, torch.float64)
    hidden, weight = (arguments.pop(name).requires_grad_() for name in ("hidden", "weight"))
    assert torch.autograd.gradcheck(
        lambda x, w: fused_linear_policy_stats(x, w, **arguments, chunk_bytes=8 * 12, backend="torch")[:2],
        (hidden, weight),
    )


def test_nothing_is_larger_than_a_tile_but_the_weight_and_its_gradient() -> None:
    arguments = problem(64, 16, 4096, 4000, 3)
    hidden, weight = (arguments.pop(name).requires_grad_() for name in ("hidden", "weight"))
    tile = 64 * 128 * 4
    with TensorSizes() as results:
        stats = fused_linear_policy_stats(hidden, weight, **arguments, chunk_bytes=tile, backend="torch")
        (stats.log_prob.sum() + stats.entropy.sum()).backward()
    large = {shape for shape, size in results.largest.items() if size > tile}
    assert large == {(4096, 16), (16, 4096)}  # the latter is a view
    assert weight.nbytes < 64 * 4096 * 4  # else the logits might have hidden among them


def test_tokens_outside_the_mask_are_not_read(backend: str) -> None:
    arguments = problem()
    mask = arguments["token_mask"]
    clean = fused(arguments, backend=backend)
    arguments["hidden"][~mask] = torch.nan
    arguments["target"] = arguments["target"].masked_fill(~mask, -100)
    stats, (grad_hidden, grad_weight) = fused(arguments, backend=backend)
    for a, b in zip(tensors((stats, (grad_hidden, grad_weight))), tensors(clean), strict=True):
        assert torch.equal(a, b)
    assert not grad_hidden[~mask].any()
    assert not grad_weight[arguments["vocab_size"] :].any()


def test_rows_are_computed_as_a_mask_of_them_is(backend: str) -> None:
    arguments = problem(n=17)
    mask = arguments["token_mask"]
    rows = mask.nonzero()[:, 0]
    compact = {name: value[rows] if name in ("target", "topk_ids") else value for name, value in arguments.items()}
    compact |= {"token_mask": None, "rows": rows}
    hidden = arguments["hidden"]
    masked_stats, masked_gradients = fused(arguments, backend=backend)

    leaf, weight = hidden.clone().requires_grad_(), arguments["weight"].clone().requires_grad_()
    stats = fused_linear_policy_stats(**{**compact, "hidden": leaf, "weight": weight}, backend=backend)
    g1, g2 = (g[rows] for g in incoming(mask.shape))
    gradients = torch.autograd.grad((g1 * stats.log_prob + g2 * stats.entropy).sum(), (leaf, weight))
    for whole, part in zip(masked_stats, stats, strict=True):
        # The matrix products have other shapes, and may sum in another order.
        torch.testing.assert_close(whole[mask], part, rtol=1e-5, atol=1e-6)
    for whole, part in zip(masked_gradients, gradients, strict=True):
        torch.testing.assert_close(whole, part, rtol=1e-5, atol=1e-6)
    assert not gradients[0][~mask].any()


def test_no_tokens_give_zeros(backend: str) -> None:
    arguments = problem(dtype=torch.bfloat16)
    for empty in (
        {**arguments, "token_mask": torch.zeros(13, dtype=torch.bool)},
        problem(n=0, dtype=torch.bfloat16),
    ):
        stats, (grad_hidden, grad_weight) = fused(empty, backend=backend)
        assert stats.topk_log_prob.shape == (empty["hidden"].shape[0], 3)
        assert grad_weight.shape == (40, 24)
        assert not any(values.any() for values in (*stats, grad_hidden, grad_weight))


def test_a_batch_of_sequences_keeps_its_shape() -> None:
    arguments = problem(12)
    flat = fused(arguments)
    shaped = {
        name: value.view(3, 4, *value.shape[1:]) if torch.is_tensor(value) and name != "weight" else value
        for name, value in arguments.items()
    }
    stats, (grad_hidden, grad_weight) = fused(shaped)
    assert stats.topk_log_prob.shape == (3, 4, 3)
    assert torch.equal(stats.log_prob.flatten(), flat[0].log_prob)
    assert torch.equal(grad_hidden.flatten(0, 1), flat[1][0])
    assert torch.equal(grad_weight, flat[1][1])


def test_only_log_prob_and_entropy_carry_gradient_and_only_once() -> None:
    arguments = problem()
    arguments["hidden"].requires_grad_()
    stats = fused_linear_policy_stats(**arguments)
    assert stats.log_prob.requires_grad
    assert stats.entropy.requires_grad
    assert not stats.collision.requires_grad
    assert not stats.topk_log_prob.requires_grad
    factor = torch.ones(13, requires_grad=True)
    (grad,) = torch.autograd.grad((factor * stats.log_prob).sum(), arguments["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_no_gradient(frozen: str) -> None:
    arguments = problem()
    trained = {"hidden": "weight", "weight": "hidden"}[frozen]
    arguments[trained].requires_grad_()
    stats = fused_linear_policy_stats(**arguments)
    with_gradients(stats, arguments[trained], arguments[trained])
    stats = fused_linear_policy_stats(**arguments)
    g1, g2 = incoming(stats.log_prob.shape)
    (g1 * stats.log_prob + g2 * stats.entropy).sum().backward()
    expected = dict(zip(("hidden", "weight"), unfused({**arguments, trained: arguments[trained].detach()})[1]))  # noqa: B905
    # As above: other backends may add in another order.
    torch.testing.assert_close(arguments[trained].grad, expected[trained], rtol=1e-5, atol=1e-6)
    assert arguments[frozen].grad is None


def test_many_tiles_lose_no_digits_of_a_bf16_weights_gradient() -> None:
    """They are summed in fp32. In bf16 each of 60 sums would be rounded, to 2^-9 of what it has come to: sqrt(60) / 3 of that
    in all, beside the 2.5 times 2^-9 that are there for one tile, from logits in bf16.
    """
    arguments = problem(240, 24, 40, 37, 0, torch.bfloat16)
    expected = eager(arguments, torch.float64)[1][1]

    def error(elements_of_a_tile: int) -> float:
        gradient = fused(arguments, chunk_bytes=2 * elements_of_a_tile)[1][1]
        return float((gradient.double() - expected).norm() / expected.norm())

    assert error(4 * 40) <= 1.25 * error(10**6)


def test_products_are_added_in_fp32_however_many_tiles() -> None:
    """What the sums add to the roundings of logits and of their gradient, by float64 products of that very gradient.

    Products rounded to bf16 before they are added would err by 1.7e-3 of the whole. The rest are roundings of fp32, and
    single logits whose fp32 sum, made in another order, lies on the other side of a step of bf16.
    """
    arguments = problem(256, 64, 1024, 1000, 0, torch.bfloat16) | {"token_mask": None}
    weight = torch.nn.Parameter(arguments["weight"])
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(1024, 64), False
    logits = (arguments["hidden"] @ weight.detach().t()).requires_grad_()
    others = {name: value for name, value in arguments.items() if name not in ("hidden", "weight")}
    vocab_parallel_policy_stats(logits, **others).log_prob.sum().backward()
    expected = logits.grad.double().t() @ arguments["hidden"].double()

    with mock.patch.object(linear_tiles, "_MIN_COLUMNS", 128):
        stats = fused_linear_policy_stats(
            **{**arguments, "weight": weight}, accumulate_into_main_grad=True, chunk_bytes=2 * 64 * 128
        )
    stats.log_prob.sum().backward()
    assert (weight.main_grad.double() - expected).norm() <= 4e-4 * expected.norm()


def test_chunks_of_a_shard_merge_into_its_partials() -> None:
    """As if its columns had been read at once, padding included."""
    logits, target = torch.randn(7, 50, dtype=torch.float64) * 5, torch.randint(0, 43, (7,))
    shard = VocabShard(None, 43, 0, 43)
    ids, every = TokenIds(target, torch.randint(0, 43, (7, 3))), RowSelection()
    parts = [
        torch_backend.shard_partials(logits[:, chunk], ids, every, shard.part(chunk), 0.7)
        for chunk in (slice(0, 20), slice(20, 21), slice(21, 44), slice(44, 50))
    ]
    whole = torch_backend.shard_partials(logits, ids, every, shard, 0.7)
    torch.testing.assert_close(merge_chunks(torch.stack(parts)), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [10**6, 1000])
def test_accumulation_into_main_grad(main_dtype: torch.dtype, elements: int) -> None:
    """On top of what is there already, as Megatron's micro-batches do, also in several tiles of tokens."""
    arguments = problem(60, 24, 40, 37, 0, torch.bfloat16)
    before = torch.randn(40, 24).to(main_dtype)
    gradient = unfused(arguments)[1][1].double()
    weight = torch.nn.Parameter(arguments["weight"])
    weight.main_grad, weight.grad_added_to_main_grad = before.clone(), False
    stats = fused_linear_policy_stats(
        **{**arguments, "weight": weight}, accumulate_into_main_grad=True, chunk_bytes=2 * elements
    )
    g1, g2 = incoming(stats.log_prob.shape)
    (g1 * stats.log_prob + g2 * stats.entropy).sum().backward()
    assert weight.grad_added_to_main_grad
    assert not weight.grad.any()
    tiles = -(-60 * 40 // elements)
    allowed = _other_order(torch.bfloat16, tiles) * gradient.norm()
    if main_dtype is torch.bfloat16:  # what is added to is rounded after each tile as well
        allowed += tiles**0.5 * 2.0**-9 * weight.main_grad.double().norm()
    assert (weight.main_grad.double() - before.double() - gradient).norm() <= allowed


WRONG_ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    r"hidden \(13, 24\) and weight \(40, 23\)": lambda: {"weight": torch.zeros(40, 23)},
    "hidden is torch.float32 on .*, weight torch.bfloat16": lambda: {"weight": torch.zeros(40, 24).bfloat16()},
    "must be bf16": lambda: {"hidden": torch.zeros(13, 24).long(), "weight": torch.zeros(40, 24).long()},
    r"target has shape \(12,\); hidden \(13, 24\) ask for \(13,\)": lambda: {"target": torch.zeros(12).long()},
    "vocab_size is 41, but 1 shard": lambda: {"vocab_size": 41},
    "temperature must be positive": lambda: {"temperature": 0.0},
    "sequence_parallel=True needs tp_group": lambda: {"sequence_parallel": True},
    "the weight has no main_grad": lambda: {"accumulate_into_main_grad": True},
    "chunk_bytes must be positive": lambda: {"chunk_bytes": 0},
    "backend must be one of": lambda: {"backend": "gpu"},
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_linear_policy_stats(**{**problem(), **WRONG_ARGUMENTS[message]()})


def test_an_id_outside_the_vocabulary_is_named() -> None:
    arguments = problem()
    arguments["token_mask"][4] = True
    arguments["target"][4] = 37
    with pytest.raises(ValueError, match=r"target at \[4\] is \[37\]: ids must lie in \[0, 37\)"):
        fused_linear_policy_stats(**arguments)
