"""Matrix products of 16-bit matrices with an fp32 result, and what their backward needs.

A product of bf16 matrices is summed in fp32 and then rounded to 8 binary digits. Logits of a language model are some 10 to 30
large, so that this rounding moves each of them by up to 0.06: here it is left out. Which way depends on the device:

* CUDA: cuBLAS writes its fp32 sums (``torch.mm(out_dtype=torch.float32)``): the same work, a result of twice the size. Both
  factors must have 16 bits, so a gradient of logits is rounded before it is multiplied, as every gradient of a 16-bit model
  is: each term of the sum by at most 2^-8 of itself (bf16).
* a CPU whose processor multiplies such matrices (AVX512-BF16, AVX512-FP16, AMX): the compiled ``fp32_product_``. torch has
  those blocks of oneDNN's, but no operator (``NotImplementedError``, torch 2.13). An fp32 gradient is multiplied with a
  bf16 matrix as the sum of two bf16 matrices, which is within 2^-17 of each of its numbers.
* elsewhere the product of the upcast matrices, which is exact up to the roundings of fp32: 16-bit values are fp32 values. The
  second matrix, which may be the vocabulary's, is upcast part by part, in ``PART_BYTES``. A gradient stays fp32. It takes
  four times as long where the processor could do better.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

try:
    from megatron_dppo.ops import native_backend
except ImportError:  # not built, or for another processor: choose_backend says so to whoever asks for it
    native_backend = None  # type: ignore[assignment]

PART_BYTES = 16 * 2**20


def is_16_bit(tensor: torch.Tensor) -> bool:
    """Whether a product of such tensors would be rounded to bf16 or fp16."""
    return tensor.dtype in (torch.bfloat16, torch.float16)


def fp32_product(a_mk: torch.Tensor, b_kn: torch.Tensor, out_mn: torch.Tensor) -> torch.Tensor:
    """``out = a @ b`` in fp32.

    Args:
        a_mk: [m, k] bf16 or fp16.
        b_kn: [k, n] of the same dtype.
        out_mn: [m, n] fp32, overwritten; rows may have gaps between them.

    Returns:
        ``out_mn``.
    """
    if _writes_fp32_sums(out_mn):
        return torch.mm(a_mk, b_kn, out_dtype=torch.float32, out=out_mn)
    if _processor_multiplies(a_mk, b_kn):
        native_backend.fp32_product_(out_mn, a_mk, b_kn, accumulate=False)
        return out_mn
    exact_mk = a_mk.float()
    for part in _parts(b_kn.shape[1], b_kn.shape[0]):
        torch.mm(exact_mk, b_kn[:, part].float(), out=out_mn[:, part])
    return out_mn


def add_product(sums_mn: torch.Tensor, a_mk: torch.Tensor, b_kn: torch.Tensor) -> None:
    """``sums += a @ b`` without a rounding in between.

    Args:
        sums_mn: [m, n] fp32. In another dtype they are rounded once, when all of the product is added, part by part.
        a_mk: [m, k] what ``gradient_factor`` made of an fp32 gradient, or a gradient of the dtype of ``b_kn``.
        b_kn: [k, n] bf16 or fp16.
    """
    if sums_mn.dtype is not torch.float32:
        for part in _parts(sums_mn.shape[0], sums_mn.shape[1]):
            exact = torch.zeros_like(sums_mn[part], dtype=torch.float32)
            add_product(exact, a_mk[part], b_kn)
            sums_mn[part] += exact
        return
    if _writes_fp32_sums(sums_mn):
        torch.addmm(sums_mn, a_mk, b_kn, out_dtype=torch.float32, out=sums_mn)
        return
    if _processor_multiplies(a_mk, b_kn):
        native_backend.fp32_product_(sums_mn, a_mk, b_kn, accumulate=True)
        return
    if a_mk.dtype is torch.float32 and b_kn.dtype is torch.bfloat16 and _processor_multiplies(b_kn, b_kn):
        _add_product_of_fp32(sums_mn, a_mk, b_kn)
        return
    # A 16-bit gradient is as large as its logits: it too is upcast part by part.
    all_rows = slice(0, a_mk.shape[0])
    for rows in _parts(*a_mk.shape) if is_16_bit(a_mk) else (all_rows,):
        for part in _parts(*b_kn.shape):
            sums_mn[rows].addmm_(a_mk[rows, part].float(), b_kn[part].float())


def _add_product_of_fp32(sums_mn: torch.Tensor, a_mk: torch.Tensor, b_kn: torch.Tensor) -> None:
    """``sums += a @ b``, ``a`` fp32 and ``b`` bf16: what ``a`` is rounded to, and what was lost by it."""
    m, k = a_mk.shape
    parts = (
        ((rows, slice(None)) for rows in _parts(m, k)) if m > k else ((slice(None), depth) for depth in _parts(k, m))
    )
    for rows, depth in parts:
        high = a_mk[rows, depth].to(b_kn.dtype)
        low = (a_mk[rows, depth] - high).to(b_kn.dtype)
        for factor in (high, low):
            native_backend.fp32_product_(sums_mn[rows], factor, b_kn[depth], accumulate=True)


def gradient_factor(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An fp32 gradient as ``add_product`` can multiply it with matrices of ``dtype``: on CUDA rounded, else as it is."""
    return gradient.to(dtype) if _writes_fp32_sums(gradient) else gradient


def _writes_fp32_sums(tensor: torch.Tensor) -> bool:
    """Whether torch has products of 16-bit matrices with an fp32 result on this tensor's device."""
    return tensor.is_cuda


def _processor_multiplies(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the compiled product takes these matrices on this processor."""
    if native_backend is None or a.device.type != "cpu" or a.dtype is not b.dtype:
        return False
    return a.dtype in native_backend.FP32_PRODUCT_DTYPES


def _parts(length: int, width: int) -> Iterator[slice]:
    """Slices of ``length``, each of which is at most ``PART_BYTES`` in fp32 (or one long) where all is ``width`` wide."""
    step = max(1, PART_BYTES // (4 * max(width, 1)))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
