"""Runs the emulated CUDA kernels over a set of cases and compares them with float64; a process of its own.

    python emulation_driver.py LIBRARY.so

needs numpy alone, so that it runs under LD_PRELOADed sanitizers. Prints one line per failure; exit status 1 if any.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from emulated_policy_gradient import INTERBLOCK_STEPS, STEPS, block_failures, policy_gradient_failures
from emulated_tile_hash import tile_hash_failures
from emulated_tile_nodes import CASES as NODE_CASES
from emulated_tile_nodes import INTERBLOCK_CASES as INTERBLOCK_NODE_CASES
from emulated_tile_nodes import tile_nodes_failures
from emulated_token_checks import token_checks_failures
from emulated_token_objective import token_objective_failures
from emulation_library import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    BackwardArguments,
    DivergenceArguments,
    Emulated,
    LogitsShard,
    MergeArguments,
    PartialsArguments,
    RowSelection,
    address,
    aligned_matrix,
    decode,
    encode,
)
from processor_product import SHAPES, product_failures


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
    select: str = "all"  # rows: a list of them; mask: one bool a row. The others hold NaN and ids that are none
    entropy: bool = True
    in_place: bool = False
    multiprocessors: int = 1  # many of them and few rows make segments


CASES = [
    Case(3, 4099, 4090, BFLOAT16, topk=2, offset=3, select="rows"),
    Case(2, 33000, 32990, FLOAT32, temperature=0.7, multiprocessors=4, in_place=True),
    Case(3, 1000, 1900, FLOAT16, shards=2, topk=3, offset=1, select="mask"),
    Case(3, 33000, 33000, BFLOAT16, topk=1, multiprocessors=4, select="mask", in_place=True),
    Case(2, 33, 1, FLOAT32, entropy=False, offset=2),
    Case(2, 40, 60, BFLOAT16, shards=2, in_place=True, temperature=2.0),
]
# Races between blocks show only with fresh fibers for each block, at 1.5 ms a thread: as few blocks as make segments.
INTERBLOCK_CASES = [
    Case(1, 32768, 32768, BFLOAT16, multiprocessors=1, in_place=True),
    Case(3, 64, 64, FLOAT32, select="mask"),
]
NO_ID = -100  # of a token that is none


def choose_rows(case: Case) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray]:
    """The list of rows, the mask (at most one of the two) and [n] the rows inside, in the order of the kernels' results."""
    n = case.rows
    if case.select == "rows":
        rows = np.array([n - 1, 0], np.int64)
        return rows, None, rows
    if case.select == "mask":
        mask = np.arange(n) % 2 == 0
        return None, mask, mask.nonzero()[0]
    return None, None, np.arange(n)


def outside(rows: np.ndarray, total: int) -> np.ndarray:
    return np.delete(np.arange(total), rows)


def failures(emulated: Any, case: Case) -> Iterator[str]:
    """Every quantity whose error is above what fp32 (and one rounding to the gradient's dtype) allows."""
    random = np.random.default_rng(0)
    n_all, width = case.rows, case.columns * case.shards
    rows, mask, chosen = choose_rows(case)
    others, n = outside(chosen, n_all), len(chosen)
    logits = random.normal(0, 3, (n_all, width))
    logits[others] = np.nan
    logits = encode(logits, case.dtype)
    target = random.integers(0, case.vocab_size, n).astype(np.int64)
    topk_ids = random.integers(0, case.vocab_size, (n, case.topk)).astype(np.int64)
    grad_log_prob = random.normal(0, 1, n).astype(np.float32)
    grad_entropy = random.normal(0, 1, n).astype(np.float32) if case.entropy else None
    grad_log_prob[0] = 0.0
    if grad_entropy is not None:
        grad_entropy[0] = 0.0  # this row's gradient is zero-filled

    def spread(values: np.ndarray, rest: float) -> np.ndarray:
        """[n, ...] -> [N, ...] with ``rest`` in the rows outside."""
        full = np.full((n_all, *values.shape[1:]), rest, values.dtype)
        full[chosen] = values
        return full

    z = decode(logits, case.dtype)[chosen][:, : case.vocab_size] / np.float64(np.float32(case.temperature))
    top = z.max(1, keepdims=True)
    log_p = z - top - np.log(np.exp(z - top).sum(1, keepdims=True))
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(1)

    # The operators' per-row arrays: one entry for every listed row, else one for every row there is.
    compact = rows is not None
    given_target = target if compact else spread(target, NO_ID)
    given_topk_ids = topk_ids if compact else spread(topk_ids, NO_ID)
    total = len(given_target)
    selection = RowSelection(address(rows), address(mask), total)
    shards, partials = [], np.full((case.shards, total, 5 + case.topk), np.nan, np.float32)
    for r in range(case.shards):
        part = aligned_matrix(logits[:, r * case.columns : (r + 1) * case.columns], case.offset)
        num_columns = min(max(case.vocab_size - r * case.columns, 0), case.columns)
        stride = part.strides[0] // part.itemsize
        shard = LogitsShard(part.ctypes.data, case.dtype, case.columns, stride, r * case.columns, num_columns)
        shards.append((part, shard))
        emulated.row_partials(
            PartialsArguments(
                *(shard, selection, address(given_target), address(given_topk_ids)),
                *(case.topk, case.temperature, address(partials[r])),
            ),
            case.multiprocessors,
        )
    names = ("log_prob", "entropy", "collision", "topk_log_prob", "max", "log_sum")
    merged = {
        name: np.full((total, case.topk) if name == "topk_log_prob" else total, np.nan, np.float32) for name in names
    }
    emulated.merge_partials(
        MergeArguments(
            *(address(partials), case.shards, total, case.topk, address(mask)), *map(address, merged.values())
        )
    )
    if not compact and (partials[:, others] != 0).any():
        yield f"{case}: the partials of a masked row are not 0"
    if not compact and any((values[others] != 0).any() for values in merged.values()):
        yield f"{case}: the results of a masked row are not 0"
    out = merged if compact else {name: values[chosen] for name, values in merged.items()}

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
    expected_grad = np.zeros((n_all, width))  # also in the rows outside
    one_hot = np.zeros_like(p)
    one_hot[np.arange(n), target] = 1
    gradient = grad_log_prob[:, None] * (one_hot - p) - ge[:, None] * p * (log_p + entropy[:, None])
    expected_grad[chosen, : case.vocab_size] = gradient / case.temperature
    epsilon = {FLOAT32: 2.0**-22, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-10}[case.dtype]
    inside = None if len(others) == 0 else spread(np.ones(n, np.bool_), False)
    given_target = spread(target, NO_ID)
    saved = [spread(out[name], np.nan) for name in ("max", "log_sum", "log_prob", "entropy")]
    incoming = [None if g is None else spread(g, np.nan) for g in (grad_log_prob, grad_entropy)]
    for r, (part, shard) in enumerate(shards):
        grad = part if case.in_place else aligned_matrix(np.full_like(part, 7), case.offset)
        emulated.policy_backward(
            BackwardArguments(
                *(shard, n_all, address(inside), address(given_target), *map(address, (*saved, *incoming))),
                *(case.temperature, address(grad), grad.strides[0] // grad.itemsize),
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
        if (got[others] != 0).any():
            yield f"{case}: shard {r}: the gradient of a masked row is not 0"


def divergence_failures(emulated: Any, case: Case) -> Iterator[str]:
    """D over the whole vocabulary, of plain and hybrid rollout policies, in this case's shape."""
    random = np.random.default_rng(1)
    width, vocab = case.columns * case.shards, case.vocab_size
    rows, mask, chosen = choose_rows(case)
    others = outside(chosen, case.rows)
    pi_logits = random.normal(0, 3, (case.rows, width))
    pi_logits[others] = np.nan
    pi_logits = encode(pi_logits, case.dtype)
    mu_logits = encode(decode(pi_logits, case.dtype) + random.normal(0, 1, (case.rows, width)), case.dtype)
    n, temperature = len(chosen), np.float64(np.float32(case.temperature))
    # Two of one thread's vectors, the first and the last column, neighbours; and a slot that does not count.
    ids = np.array([i % vocab for i in (0, 1, 2, vocab - 1, 4096, 8192, 12289)], np.int64)
    ids = np.stack([np.append(np.unique(ids), -1)] * n)
    known_log_prob = random.uniform(-9, -5, ids.shape).astype(np.float32)
    rescale = random.uniform(-1, 1, n).astype(np.float32)

    def log_softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        z = decode(logits, case.dtype)[chosen][:, :vocab] / temperature
        top = z.max(1)
        log_sum = np.log(np.exp(z - top[:, None]).sum(1))
        return z - top[:, None] - log_sum[:, None], top.astype(np.float32), log_sum.astype(np.float32)

    (log_pi, *pi_normaliser), (log_mu, *mu_normaliser) = log_softmax(pi_logits), log_softmax(mu_logits)
    compact = rows is not None
    total = n if compact else case.rows

    def given(values: np.ndarray) -> np.ndarray:
        """[n, ...] -> the operator's array: [n, ...], or [N, ...] with nothing of use outside the mask."""
        if compact:
            return values
        full = np.full((total, *values.shape[1:]), NO_ID if values.dtype == np.int64 else np.nan, values.dtype)
        full[chosen] = values
        return full

    normalisers = [given(values) for values in (*pi_normaliser, *mu_normaliser)]
    known = [given(values) for values in (ids, known_log_prob, rescale)]
    for hybrid, distance in itertools.product((False, True), (0, 1)):
        expected_mu = log_mu + rescale[:, None] if hybrid else log_mu
        if hybrid:
            np.put_along_axis(expected_mu, ids[:, :-1], known_log_prob[:, :-1].astype(np.float64), 1)
        mu, pi = np.exp(expected_mu), np.exp(log_pi)
        terms = mu * (expected_mu - log_pi) if distance else 0.5 * np.abs(mu - pi)
        got = np.zeros(n)
        for r in range(case.shards):
            parts = [
                aligned_matrix(x[:, r * case.columns : (r + 1) * case.columns], case.offset)
                for x in (pi_logits, mu_logits)
            ]
            num_columns = min(max(vocab - r * case.columns, 0), case.columns)
            shards = [
                LogitsShard(
                    part.ctypes.data,
                    case.dtype,
                    case.columns,
                    part.strides[0] // part.itemsize,
                    r * case.columns,
                    num_columns,
                )
                for part in parts
            ]
            arguments = DivergenceArguments(
                *shards,
                RowSelection(address(rows), address(mask), total),
                *map(address, normalisers),
                *(map(address, known) if hybrid else (None, None, None)),
                ids.shape[1] if hybrid else 0,
                case.temperature,
                distance,
                None,
            )
            segments = emulated.divergence_segments(arguments, case.multiprocessors)
            sums = np.full((total, segments), np.nan, np.float32)
            arguments.sums = address(sums)
            emulated.shard_divergence(arguments, case.multiprocessors)
            shares = sums.astype(np.float64).sum(1)
            if not compact and (shares[others] != 0).any():
                yield f"{case}: the divergence of a masked row is not 0"
            got += shares if compact else shares[chosen]
        # y = (x - max) s - offset is off by a few 2^-24 of its largest intermediate, about 60; that scales mu and pi.
        slack = 64 * 2.0**-22 * (np.abs(terms) + mu + pi).sum(1)
        error = np.abs(got - terms.sum(1))
        if not (error <= slack).all():
            yield f"{case}: divergence (hybrid={hybrid}, kl={bool(distance)}) is off by {error.max():.1e}"


def main() -> int:
    emulated = Emulated(sys.argv[1])
    interblock = "--interblock" in sys.argv[2:]
    suites = [(failures, case) for case in (INTERBLOCK_CASES if interblock else CASES)]
    suites += [(divergence_failures, case) for case in (INTERBLOCK_CASES[1:] if interblock else CASES)]
    suites += [(token_objective_failures, 150 if interblock else n) for n in (300, 1, 0)[: 1 if interblock else 3]]
    suites += [(policy_gradient_failures, step) for step in (INTERBLOCK_STEPS if interblock else STEPS)]
    suites += [(token_checks_failures, n) for n in (300, 1, 0)[: 1 if interblock else 3]]
    suites += [(tile_nodes_failures, case) for case in (INTERBLOCK_NODE_CASES if interblock else NODE_CASES)]
    suites.append((tile_hash_failures, interblock))
    found = list(block_failures(emulated))
    if hasattr(emulated.library, "fp32_product"):  # a CPU's kernels only
        found += [failure for shape in SHAPES for failure in product_failures(emulated.library, shape)]
    for suite, case in suites:
        try:
            found += suite(emulated, case)
        except RuntimeError as error:
            found.append(f"{case}: {error}")
    print("\n".join(found) or "ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
