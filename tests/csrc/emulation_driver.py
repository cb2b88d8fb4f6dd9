"""Runs the emulated CUDA kernels over a set of cases and compares them with float64; a process of its own.

    python emulation_driver.py LIBRARY.so

needs numpy alone, so that it runs under LD_PRELOADed sanitizers. Prints one line per failure; exit status 1 if any.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOAT32, BFLOAT16, FLOAT16 = range(3)
INT64, FLOAT, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def structure(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


# The structures of csrc/core/arguments.h.
LogitsShard = structure(
    "LogitsShard",
    ("data", POINTER),
    ("dtype", ctypes.c_int),
    ("columns", INT64),
    ("row_stride", INT64),
    ("first_column", INT64),
    ("num_columns", INT64),
)
RowSelection = structure("RowSelection", ("rows", POINTER), ("n", INT64))
PartialsArguments = structure(
    "PartialsArguments",
    ("logits", LogitsShard),
    ("selection", RowSelection),
    ("target", POINTER),
    ("topk_ids", POINTER),
    ("topk", INT64),
    ("temperature", FLOAT),
    ("partials", POINTER),
)
MergeArguments = structure(
    "MergeArguments",
    ("partials", POINTER),
    ("shards", INT64),
    ("n", INT64),
    ("topk", INT64),
    *((name, POINTER) for name in ("log_prob", "entropy", "collision", "topk_log_prob", "max", "log_sum")),
)
BackwardArguments = structure(
    "BackwardArguments",
    ("logits", LogitsShard),
    ("selection", RowSelection),
    *((name, POINTER) for name in ("target", "max", "log_sum", "log_prob", "entropy", "grad_log_prob", "grad_entropy")),
    ("temperature", FLOAT),
    ("grad_logits", POINTER),
    ("grad_row_stride", INT64),
)


@dataclass(frozen=True)
class Case:
    """One [rows, shards * columns] problem; ``vocab_size`` leaves padding at its end."""

    rows: int
    columns: int
    vocab_size: int
    dtype: int
    shards: int = 1
    topk: int = 0
    temperature: float = 1.0
    offset: int = 0  # elements by which every row misses a 16-byte boundary
    select: bool = False
    entropy: bool = True
    in_place: bool = False
    multiprocessors: int = 1  # many of them and few rows make segments


CASES = [
    Case(3, 4099, 4090, BFLOAT16, topk=2, offset=3, select=True),
    Case(2, 33000, 32990, FLOAT32, temperature=0.7, multiprocessors=4, in_place=True),
    Case(3, 1000, 1900, FLOAT16, shards=2, topk=3, offset=1),
    Case(2, 33, 1, FLOAT32, entropy=False, offset=2),
    Case(2, 40, 60, BFLOAT16, shards=2, in_place=True, temperature=2.0),
]
# Races between blocks show only with fresh fibers for each block, at 1.5 ms a thread: as few blocks as make segments.
INTERBLOCK_CASES = [Case(1, 32768, 32768, BFLOAT16, multiprocessors=1, in_place=True), Case(2, 64, 64, FLOAT32)]


def encode(values: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == FLOAT16:
        return values.astype(np.float16)
    if dtype == FLOAT32:
        return values.astype(np.float32)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(values: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def aligned_matrix(values: np.ndarray, offset: int) -> np.ndarray:
    """A copy whose rows all begin ``offset`` elements behind a 16-byte boundary; its end is the end of the allocation."""
    rows, columns = values.shape
    per_boundary = 16 // values.itemsize
    stride = -(-columns // per_boundary) * per_boundary
    needed = offset + (rows - 1) * stride + columns
    flat = np.empty(needed, values.dtype)
    matrix = np.lib.stride_tricks.as_strided(
        flat[offset:], (rows, columns), (stride * values.itemsize, values.itemsize)
    )
    matrix[:] = values
    return matrix


def address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class Emulated:
    """The three launchers; an error they report becomes RuntimeError."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        for name in ("row_partials", "merge_partials", "policy_backward"):
            function = getattr(library, f"emulated_{name}")
            function.restype = ctypes.c_char_p
            setattr(self, name, self._raising(function))

    @staticmethod
    def _raising(function: Callable[..., bytes | None]) -> Callable[..., None]:
        def call(arguments: ctypes.Structure, *others: int) -> None:
            if error := function(ctypes.byref(arguments), *others):
                raise RuntimeError(error.decode())

        return call


def failures(emulated: Any, case: Case) -> Iterator[str]:
    """Every quantity whose error is above what fp32 (and one rounding to the gradient's dtype) allows."""
    random = np.random.default_rng(0)
    n_all, width = case.rows, case.columns * case.shards
    logits = encode(random.normal(0, 3, (n_all, width)), case.dtype)
    rows = np.array([n_all - 1, 0], np.int64) if case.select else None
    chosen = np.arange(n_all) if rows is None else rows
    n = len(chosen)
    target = random.integers(0, case.vocab_size, n).astype(np.int64)
    topk_ids = random.integers(0, case.vocab_size, (n, case.topk)).astype(np.int64)
    grad_log_prob = random.normal(0, 1, n).astype(np.float32)
    grad_entropy = random.normal(0, 1, n).astype(np.float32) if case.entropy else None
    grad_log_prob[0] = 0.0
    if grad_entropy is not None:
        grad_entropy[0] = 0.0  # this row's gradient is zero-filled

    z = decode(logits, case.dtype)[chosen][:, : case.vocab_size] / np.float64(np.float32(case.temperature))
    top = z.max(1, keepdims=True)
    log_p = z - top - np.log(np.exp(z - top).sum(1, keepdims=True))
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(1)

    selection = RowSelection(address(rows), n)
    shards, partials = [], np.full((case.shards, n, 5 + case.topk), np.nan, np.float32)
    for r in range(case.shards):
        part = aligned_matrix(logits[:, r * case.columns : (r + 1) * case.columns], case.offset)
        num_columns = min(max(case.vocab_size - r * case.columns, 0), case.columns)
        stride = part.strides[0] // part.itemsize
        shard = LogitsShard(part.ctypes.data, case.dtype, case.columns, stride, r * case.columns, num_columns)
        shards.append((part, shard))
        emulated.row_partials(
            PartialsArguments(
                shard, selection, address(target), address(topk_ids), case.topk, case.temperature, address(partials[r])
            ),
            case.multiprocessors,
        )
    names = ("log_prob", "entropy", "collision", "topk_log_prob", "max", "log_sum")
    out = {name: np.full((n, case.topk) if name == "topk_log_prob" else n, np.nan, np.float32) for name in names}
    emulated.merge_partials(MergeArguments(address(partials), case.shards, n, case.topk, *map(address, out.values())))

    # z and its maximum are rounded to fp32 (2^-24 relative each), 2^-22 more for the two logarithms and sums.
    tolerance = float(np.abs(z).max()) * 2.0**-22 + np.abs(log_p[np.arange(n), target]).max() * 2.0**-22
    expected = {
        "log_prob": log_p[np.arange(n), target],
        "entropy": entropy,
        "collision": (p * p).sum(1),
        "topk_log_prob": np.take_along_axis(log_p, topk_ids, 1),
        "max": top[:, 0],
        "log_sum": np.log(np.exp(z - top).sum(1)),
    }
    for name, value in expected.items():
        error = np.abs(out[name] - value).max(initial=0.0)
        if not error <= tolerance:
            yield f"{case}: {name} is off by {error:.1e}"

    ge = np.zeros(n) if grad_entropy is None else grad_entropy.astype(np.float64)
    expected_grad = np.zeros((n_all, width))
    one_hot = np.zeros_like(p)
    one_hot[np.arange(n), target] = 1
    gradient = grad_log_prob[:, None] * (one_hot - p) - ge[:, None] * p * (log_p + entropy[:, None])
    expected_grad[chosen, : case.vocab_size] = gradient / case.temperature
    epsilon = {FLOAT32: 2.0**-22, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-10}[case.dtype]
    for r, (part, shard) in enumerate(shards):
        grad = part if case.in_place else aligned_matrix(np.zeros_like(part), case.offset)
        untouched = np.delete(decode(part, case.dtype), chosen, 0) if case.in_place else 0.0
        emulated.policy_backward(
            BackwardArguments(
                shard,
                selection,
                address(target),
                *(address(out[name]) for name in ("max", "log_sum", "log_prob", "entropy")),
                address(grad_log_prob),
                address(grad_entropy),
                case.temperature,
                address(grad),
                grad.strides[0] // grad.itemsize,
            ),
            case.multiprocessors,
        )
        got = decode(np.ascontiguousarray(grad), case.dtype)
        want = expected_grad[:, r * case.columns : (r + 1) * case.columns]
        error = np.abs(got - want)[chosen] - (
            epsilon * np.abs(want[chosen]) + 2 * tolerance * np.abs(want[chosen]).max()
        )
        if not (error <= 2.0**-24).all():  # 2^-24: half's smallest subnormal
            yield f"{case}: the gradient of shard {r} is off by {np.abs(got - want)[chosen].max():.1e}"
        if (got[:, shard.num_columns :][chosen] != 0).any():
            yield f"{case}: shard {r}: padded columns have a gradient"
        if not np.array_equal(np.delete(got, chosen, 0), np.broadcast_to(untouched, np.delete(got, chosen, 0).shape)):
            yield f"{case}: shard {r}: a row that was not selected was written"


def main() -> int:
    emulated = Emulated(sys.argv[1])
    cases = INTERBLOCK_CASES if "--interblock" in sys.argv[2:] else CASES
    found: list[str] = []
    for case in cases:
        try:
            found += failures(emulated, case)
        except RuntimeError as error:
            found.append(f"{case}: {error}")
    print("\n".join(found) or "ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
