"""The product of 16-bit matrices with an fp32 result, which CPUs have a kernel for, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
from emulation_library import BFLOAT16, FLOAT16, INT64, POINTER, address, aligned_matrix, decode, encode, structure

HalfMatrix = structure("HalfMatrix", ("data", POINTER), ("row_stride", INT64), ("column_stride", INT64))
Fp32ProductArguments = structure(
    "Fp32ProductArguments",
    ("dtype", ctypes.c_int),
    *((name, INT64) for name in ("m", "n", "k")),
    ("a", HalfMatrix),
    ("b", HalfMatrix),
    ("sums", POINTER),
    ("sums_row_stride", INT64),
    ("accumulate", ctypes.c_bool),
)
# Whole blocks of 64 rows and columns and a part of one, one row, panels of 1024 deep and 2048 wide, an odd depth, nothing.
SHAPES = ((130, 70, 33), (64, 64, 64), (1, 2050, 7), (3, 5, 1027), (65, 1, 2), (5, 3, 0), (0, 4, 2))
ROUNDING = 2.0**-24


def product_failures(library: ctypes.CDLL, shape: tuple[int, int, int]) -> Iterator[str]:
    """Both dtypes, every way that the factors may lie in memory, added to sums and not."""
    m, n, k = shape
    random = np.random.default_rng(m + n + k)
    for way in range(16):
        dtype = FLOAT16 if way & 1 else BFLOAT16
        a, exact_a = _factor(random, m, k, dtype, transposed=bool(way & 2))
        b, exact_b = _factor(random, k, n, dtype, transposed=bool(way & 4))
        accumulate = bool(way & 8)
        sums = random.standard_normal((m, n + 3)).astype(np.float32)
        before = sums.astype(np.float64)
        arguments = Fp32ProductArguments(dtype, m, n, k, a[0], b[0], address(sums), n + 3, accumulate)
        library.fp32_product(ctypes.byref(arguments))
        start = before[:, :n] * accumulate
        error = np.abs(sums[:, :n] - start - exact_a @ exact_b)
        # k products, rounded and added one by one.
        allowed = (2 * k + 1) * ROUNDING * (np.abs(start) + np.abs(exact_a) @ np.abs(exact_b))
        if not (error <= allowed).all() or (sums[:, n:] != before[:, n:]).any():
            yield f"the product {shape}, way {way}, is wrong"


def _factor(
    random: np.random.Generator, rows: int, columns: int, dtype: int, transposed: bool
) -> tuple[Any, np.ndarray]:
    """((its description, its memory), its values)."""
    values = encode(random.standard_normal((rows, columns)), dtype)
    if values.size == 0:
        return (HalfMatrix(None, 1, 1), values), decode(values, dtype)
    memory = aligned_matrix(values.T if transposed else values, offset=1)
    stride = memory.strides[0] // memory.itemsize
    strides = (1, stride) if transposed else (stride, 1)
    return (HalfMatrix(address(memory), *strides), memory), decode(values, dtype)
