"""The operator that sums products of 16-bit matrices in fp32, on a processor that has instructions for them.

The kernel's own part, for any processor, is in test_sanitized_cpu_kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

native_backend = pytest.importorskip(
    "megatron_dppo.ops.native_backend", reason="the extension megatron_dppo._C is not built"
)
DTYPES = native_backend.FP32_PRODUCT_DTYPES
EPS = 2.0**-24

needs_instructions = pytest.mark.skipif(not DTYPES, reason="this processor has no instructions for 16-bit products")
product = torch.ops.megatron_dppo.fp32_product_


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with torch.device("cpu"):  # a GPU's product is torch's own
        yield


def factor(rows: int, columns: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "rows":
        return torch.randn(rows, columns).to(dtype)
    if layout == "columns":
        return torch.randn(columns, rows).to(dtype).t()
    return torch.randn(rows, 2 * columns + 1).to(dtype)[:, 1 : columns + 1]


LAYOUTS = st.sampled_from(["rows", "columns", "part"])
SIZES = st.one_of(st.integers(0, 200), st.sampled_from([1023, 1024, 1025, 2048, 2113]))


@needs_instructions
@settings(max_examples=60, deadline=None)
@given(m=SIZES, n=SIZES, k=SIZES, a=LAYOUTS, b=LAYOUTS, threads=st.sampled_from([1, 2, 3]), accumulate=st.booleans())
def test_sums_are_those_of_float64(m: int, n: int, k: int, a: str, b: str, threads: int, accumulate: bool) -> None:
    """k products and what was there, each rounded and added: 2 k + 1 roundings at most of every term."""
    torch.manual_seed(m + n + k)
    dtype, before = DTYPES[0], torch.get_num_threads()
    a_mk, b_kn = factor(m, k, dtype, a), factor(k, n, dtype, b)
    memory = torch.randn(m, n + 3)
    original = memory.double()
    torch.set_num_threads(threads)
    try:
        native_backend.fp32_product_(memory[:, :n], a_mk, b_kn, accumulate=accumulate)
    finally:
        torch.set_num_threads(before)
    start = original[:, :n] * accumulate
    error = (memory[:, :n].double() - start - a_mk.double() @ b_kn.double()).abs()
    assert (error <= (2 * k + 1) * EPS * (start.abs() + a_mk.double().abs() @ b_kn.double().abs())).all()
    assert torch.equal(memory[:, n:].double(), original[:, n:])


@needs_instructions
def test_infinity_and_nan_reach_their_row_and_column_only() -> None:
    a_mk, b_kn = factor(70, 35, DTYPES[0], "rows"), factor(35, 66, DTYPES[0], "rows")
    a_mk[3, 34], b_kn[34, 65] = float("inf"), float("nan")
    sums = torch.empty(70, 66)
    native_backend.fp32_product_(sums, a_mk, b_kn, accumulate=False)
    finite = torch.isfinite(sums)
    assert not finite[3].any()
    assert not finite[:, 65].any()
    finite[3], finite[:, 65] = True, True
    assert finite.all()


@pytest.mark.parametrize(
    ("sums", "a", "b", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4).bfloat16(), torch.zeros(5, 3).bfloat16(), "b must have shape"),
        (torch.zeros(2, 3), torch.zeros(3, 4).bfloat16(), torch.zeros(4, 3).bfloat16(), "a must have shape"),
        (torch.zeros(2, 3), torch.zeros(2, 4).bfloat16(), torch.zeros(4, 3).half(), "a is .*, b "),
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(4, 3), "16-bit"),
        (torch.zeros(2, 3), torch.zeros(2, 4).int(), torch.zeros(4, 3).int(), "16-bit"),
        (torch.zeros(2, 3).double(), torch.zeros(2, 4).half(), torch.zeros(4, 3).half(), "sums must be float32"),
        (torch.zeros(1, 3).expand(2, 3), torch.zeros(2, 4).half(), torch.zeros(4, 3).half(), "share memory"),
        (torch.zeros(2, 3), torch.zeros(2, 8).half()[:, ::2], torch.zeros(4, 3).half(), "contiguous rows or columns"),
    ],
)
def test_what_does_not_fit_is_refused(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        product(sums, a, b, False)
