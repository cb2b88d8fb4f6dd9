"""All ways to an fp32 product of 16-bit matrices, on a CPU.

torch has the operators that CUDA uses (``mm`` and ``addmm`` with ``out_dtype``) on no CPU. ``as_on_cuda`` puts stand-ins
there, which demand of their arguments what the CUDA ones do, and round nothing but their fp32 result. What it cannot show is
how cuBLAS sums. ``device`` leaves it to the machine, which may have no way but the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from megatron_dppo.ops import fp32_product


@contextmanager
def upcast() -> Iterator[None]:
    """Within: no product is left to the device, whatever it could do."""
    with (
        mock.patch.object(fp32_product, "_writes_fp32_sums", return_value=False),
        mock.patch.object(fp32_product, "_processor_multiplies", return_value=False),
    ):
        yield


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Within: products on the CPU are those that a GPU would be asked for. A GPU is asked for them in any case."""
    if torch.get_default_device().type == "cuda":
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("mm.dtype_out", _mm, "CPU")
        library.impl("addmm.dtype_out", _addmm, "CPU")
        with mock.patch.object(fp32_product, "_writes_fp32_sums", return_value=True):
            yield
    finally:
        library._destroy()


WAYS = {"upcast": upcast, "out_dtype": as_on_cuda, "device": nullcontext}


def rounds_gradients(way: str) -> bool:
    """Whether an fp32 gradient is rounded to 16 bits before it is multiplied."""
    return way == "out_dtype" or (way == "device" and torch.get_default_device().type == "cuda")


def _mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
    _check(a, b, out_dtype, out)
    return out.copy_(a.float() @ b.float())


def _addmm(
    sums: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    beta: Any = 1,
    alpha: Any = 1,
    out: torch.Tensor,
) -> torch.Tensor:
    _check(a, b, out_dtype, out)
    assert sums.dtype is out_dtype
    assert sums is out or sums.data_ptr() == out.data_ptr()
    assert (beta, alpha) == (1, 1)
    return out.copy_(sums + a.float() @ b.float())


def _check(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, out: torch.Tensor) -> None:
    assert a.dtype is b.dtype
    assert a.dtype in (torch.bfloat16, torch.float16)
    assert out.dtype is out_dtype is torch.float32
    assert out.shape == (a.shape[0], b.shape[1])
    assert out.is_contiguous()  # else CUDA computes it elsewhere, and copies
