"""What the operators are to torch: schemas that say what is written, shapes for torch.compile, no silent place in autograd.

Every operator, on the device under test and on the emulated CUDA kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("megatron_dppo.ops.native_backend", reason="the extension megatron_dppo._C is not built")
from megatron_dppo.ops import native_backend
from megatron_dppo.ops.backend import choose_backend

N, V, K, SHARDS = 5, 19, 3, 2
Call = tuple[tuple[Any, ...], dict[str, Any]]


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, V, shape)


def per_row(n: int = N) -> torch.Tensor:
    return -torch.rand(n)


def backward_inputs() -> tuple[Any, ...]:
    mask = torch.tensor([True, False, True, True, True])
    return mask, ids(N), *(per_row() for _ in range(4)), per_row(), None, 0.7, 0, V - 2


def shard_divergence() -> Call:
    logits, known = torch.randn(2, N, V).bfloat16(), (ids(2, K), -torch.rand(2, K), per_row(2))
    normalisers = [per_row(2) for _ in range(4)]
    return (*logits, torch.tensor([3, 1]), None, *normalisers, *known, "kl", 1.0, 0, V), {}


def token_objective() -> Call:
    topk = (ids(N, K), -5 - torch.rand(N, K), -5 - torch.rand(N, K))
    rule = {"divergence": "topk_kl", "direction": "uniform_tail", "trust_region": "mask"}
    limits = [0.05, 0.05, 10.0, 0.2, 0.2, 3.0, 0.1, 2.0]
    statistics = (per_row(), per_row(), torch.randn(N), torch.rand(N), torch.rand(N), ids(N), torch.rand(N) < 0.5)
    return (*statistics, *topk, None, V), {**rule, "limits": limits}


def policy_gradient() -> Call:
    rule = {"divergence": "topk_tv", "direction": "exact_collision", "trust_region": "mask"}
    limits = [0.05, 0.05, 10.0, 0.2, 0.2, 3.0, 0.1, 2.0]
    mask = torch.tensor([True, False, True, True, True])
    fields = (mask, ids(N), per_row(), torch.randn(N), ids(N, K), -5 - torch.rand(N, K), torch.rand(N))
    return (torch.randn(N, V).bfloat16(), *fields, 0.7, V - 2, 0.5), {**rule, "limits": limits}


def check_tokens() -> Call:
    tokens = (ids(N), torch.randn(N), per_row(), torch.rand(N) < 0.5, ids(N, K), -5 - torch.rand(N, K), per_row())
    return (*tokens, V), {"log_prob_tolerance": 1e-3, "mass_tolerance": 1e-3}


def tile_hash() -> Call:
    sums = torch.zeros(2, 2, dtype=torch.int32)
    return (sums, [torch.randn(4, 6), torch.randn(2, 8).bfloat16()], [4, 2], [6, 8], [0, 0], [0, 1]), {}


def tile_nodes() -> Call:
    return (torch.randn(N, 150), torch.tensor([3, 1]), None, ids(2), ids(2, K), 0.7, 256, 140, 2), {}


def fp32_product() -> Call:
    return (torch.randn(4, 6)[:, :5], torch.randn(7, 4).bfloat16().t(), torch.randn(7, 5).bfloat16(), True), {}


CALLS: dict[str, Callable[[], Call]] = {
    "row_partials": lambda: ((torch.randn(N, V), torch.tensor([3, 1]), None, ids(2), ids(2, K), 0.7, 0, V), {}),
    "merge_partials": lambda: ((torch.rand(SHARDS, N, 5 + K), torch.rand(N) < 0.5), {}),
    "tile_nodes": tile_nodes,
    "merge_tile_nodes": lambda: ((torch.rand(SHARDS, N, 4 * 3 + 1 + K), torch.rand(N) < 0.5, 0.7, 3, 3), {}),
    "policy_backward": lambda: ((torch.randn(N, V).half(), torch.zeros(N, V).half(), *backward_inputs()), {}),
    "policy_backward_": lambda: ((torch.randn(N, V), *backward_inputs()), {}),
    "shard_divergence": shard_divergence,
    "token_objective": token_objective,
    "policy_gradient_": policy_gradient,
    "check_tokens": check_tokens,
    "tile_hash": tile_hash,
    "fp32_product_": fp32_product,
}
WRITTEN = {
    "fp32_product_": 0,
    "policy_backward": 1,
    "policy_backward_": 0,
    "policy_gradient_": 0,
    "tile_hash": 0,
}  # which argument


def operator(backend: str, name: str) -> Any:
    if name == "fp32_product_":
        if backend != "cpu":
            pytest.skip("elsewhere torch has this product")
        if torch.bfloat16 not in native_backend.FP32_PRODUCT_DTYPES:
            pytest.skip("this processor multiplies no bf16 matrices")
    return getattr(choose_backend(backend, torch.zeros(1)).operators, name).default


def requiring_grad(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]


def test_no_operator_is_left_out() -> None:
    registered = {
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "megatron_dppo::" in name
    }
    assert registered == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_torch_finds_nothing_wrong(name: str, compiled_backend: str) -> None:
    arguments, settings = CALLS[name]()
    torch.library.opcheck(operator(compiled_backend, name), arguments, settings)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_written_counts_as_modified_and_nothing_else(name: str, compiled_backend: str) -> None:
    arguments, settings = CALLS[name]()
    tensors = [a for a in torch.utils._pytree.tree_leaves(arguments) if torch.is_tensor(a)]
    versions = [tensor._version for tensor in tensors]
    operator(compiled_backend, name)(*arguments, **settings)
    modified = [tensor for tensor, version in zip(tensors, versions, strict=True) if tensor._version != version]
    assert [id(tensor) for tensor in modified] == ([id(arguments[WRITTEN[name]])] if name in WRITTEN else [])


@pytest.mark.parametrize("name", [name for name in CALLS if name != "tile_hash"])
def test_a_derivative_that_is_not_there_is_an_error(name: str, compiled_backend: str) -> None:
    arguments, settings = CALLS[name]()
    call, given = operator(compiled_backend, name), requiring_grad(arguments)
    message = "in-place operation|has no derivative|derivative for .* is not implemented"

    def differentiated() -> None:
        results = call(*given, **settings)
        (results[0] if isinstance(results, tuple) else results).sum().backward()

    with pytest.raises(RuntimeError, match=message):
        differentiated()
    with torch.no_grad():
        call(*given, **settings)


def test_hashing_parameters_needs_no_permission(compiled_backend: str) -> None:
    """Integers have no gradient: it is the same with gradients on, of weights that have one."""
    (sums, sources, *others), settings = tile_hash()
    call = operator(compiled_backend, "tile_hash")
    call(sums, [source.requires_grad_() for source in sources], *others, **settings)
    expected = torch.zeros_like(sums)
    call(expected, [source.detach() for source in sources], *others, **settings)
    assert torch.equal(sums, expected)
    assert sums.any()
    assert not sums.requires_grad
