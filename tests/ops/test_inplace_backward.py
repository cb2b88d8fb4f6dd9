"""The gradient over the logits, where that is asked for: right, only where it can be, and never behind autograd's back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.ops.dense_statistics import stats_of


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward_writes_into_the_logits_storage(masked: bool, dtype: torch.dtype, backend: str) -> None:
    source = torch.randn(2, 3, 10).to(dtype).requires_grad_()
    target = torch.randint(0, 8, (2, 3))
    mask = torch.tensor([[True, False, True], [True, True, False]]) if masked else None
    grads, address = {}, 0
    for inplace in (False, True):
        logits = source * 1
        seen = []
        logits.register_hook(lambda grad, seen=seen: seen.append(grad.data_ptr()))
        stats = stats_of(backend, logits, target, vocab_size=8, token_mask=mask, inplace_backward=inplace)
        address = logits.data_ptr()
        (grads[inplace],) = torch.autograd.grad(stats.log_prob.sum() + stats.entropy.sum(), source)
        assert (seen[0] == address) == inplace
    assert torch.equal(grads[True], grads[False])


@pytest.mark.parametrize("other", ["a loss that saved them", "a second loss in place", "the same loss again"])
def test_inplace_backward_is_an_error_where_the_logits_are_needed_afterwards(other: str, backend: str) -> None:
    source = torch.randn(3, 4, requires_grad=True)
    logits, target = source * 1, torch.tensor([0, 1, 2])
    stats = stats_of(backend, logits, target, inplace_backward=True)
    later = {
        "a loss that saved them": lambda: logits.square().sum(),
        "a second loss in place": lambda: stats_of(backend, logits, target, inplace_backward=True).entropy.sum(),
        "the same loss again": lambda: stats.log_prob.sum(),
    }[other]()
    stats.log_prob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


@pytest.mark.parametrize(
    "make", [lambda x: x.expand(3, 5), lambda x: x.as_strided((2, 3), (1, 1))], ids=["expanded", "overlapping"]
)
def test_rows_that_share_memory_are_not_written(make: Callable[[torch.Tensor], torch.Tensor], backend: str) -> None:
    source = torch.randn(1, 5, requires_grad=True)
    shared, apart = make(source * 1), make(source * 1).contiguous()
    target = torch.zeros(shared.shape[0], dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rows of the logits share memory .*: pass logits.contiguous\(\)"):
        stats_of(backend, shared, target, inplace_backward=True)
    grads = []
    for logits, inplace in ((shared, False), (apart, True)):
        stats = stats_of(backend, logits, target, inplace_backward=inplace)
        grads += torch.autograd.grad(stats.log_prob.sum() + stats.entropy.sum(), source, retain_graph=True)
    # Sums of at most 5 terms below 1, in the kernels' order and over rows.
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_non_contiguous_logits(inplace: bool, backend: str) -> None:
    base = torch.randn(6, 4, 9)
    target = torch.randint(0, 9, (4, 5))
    for make in (lambda x: x[1:].transpose(0, 1), lambda x: x.permute(1, 2, 0).contiguous().transpose(1, 2)[:, :5]):
        x = base.clone().requires_grad_()
        view = make(x * 1)
        assert not view.is_contiguous()
        stats_of(backend, view, target, inplace_backward=inplace).log_prob.sum().backward()
        y = base.clone().requires_grad_()
        stats_of(backend, make(y * 1).contiguous(), target).log_prob.sum().backward()
        assert torch.equal(x.grad, y.grad)
