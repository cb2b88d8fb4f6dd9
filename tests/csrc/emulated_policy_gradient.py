"""The emulated one-pass kernel against the kernels that make two passes, which are held to float64: every bit is the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from emulation_library import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    BackwardArguments,
    LogitsShard,
    MergeArguments,
    PartialsArguments,
    PolicyGradientArguments,
    RowSelection,
    TokenObjectiveArguments,
    address,
    aligned_matrix,
    encode,
)

NO_ID = -100  # of a token that is none


@dataclass(frozen=True)
class Step:
    """One [rows, columns] problem of a whole vocabulary, with padding at its end."""

    rows: int
    columns: int
    vocab_size: int
    dtype: int
    rule: tuple[int, int, int]  # divergence, direction, trust region
    topk: int = 0
    temperature: float = 1.0
    offset: int = 0  # elements by which every row misses a 16-byte boundary
    masked: bool = False
    weighted: bool = False
    scale: float = 1.0
    blocks: int = 2  # fewer than rows: a block takes several


# Rows longer than 4 steps of 256 threads times 16 values take the loop that loads ahead.
STEPS = [
    Step(5, 17000, 16990, BFLOAT16, (0, 0, 0), offset=3, masked=True),
    Step(3, 16500, 16500, FLOAT32, (3, 1, 0), topk=2, temperature=0.7, weighted=True, scale=0.25, blocks=1),
    Step(4, 1000, 990, FLOAT16, (1, 4, 1), offset=1, masked=True, weighted=True),
    Step(4, 33, 1, FLOAT32, (2, 3, 3), topk=3, blocks=4),
]
INTERBLOCK_STEPS = [Step(3, 64, 60, BFLOAT16, (3, 1, 0), topk=2, masked=True)]


def policy_gradient_failures(emulated: Any, step: Step) -> Iterator[str]:
    """Every result that differs from the two passes' by a bit."""
    random = np.random.default_rng(3)
    n, vocab = step.rows, step.vocab_size
    logits = random.normal(0, 3, (n, step.columns))
    logits[:, vocab:] = 50.0
    advantage = random.normal(0, 1, n).astype(np.float32)
    advantage[n // 2] = 0.0  # nothing flows back
    target = random.integers(0, vocab, n)
    topk_ids = random.integers(0, vocab, (n, step.topk))
    log_mu, topk_log_mu = (-random.uniform(1, 9, shape).astype(np.float32) for shape in (n, (n, step.topk)))
    weights = random.uniform(0.5, 2, n).astype(np.float32) if step.weighted else None
    mask = np.arange(n) % 3 != 1 if step.masked else None
    if mask is not None:
        logits[~mask], advantage[~mask], target[~mask], topk_ids[~mask] = np.nan, np.nan, NO_ID, NO_ID
    limits = (0.05, 0.1, 1.7, math.log(0.8), math.log(1.28), math.log(3.0), 0.5, 1.5)

    def arguments(part: np.ndarray) -> tuple[PolicyGradientArguments, dict[str, np.ndarray]]:
        """Of both ways; whatever is written is NaN before."""
        floats = ("log_prob", "entropy", "collision", "topk_log_prob", "max", "log_sum", "grad_log_prob")
        out = {
            name: np.full((n, step.topk) if name == "topk_log_prob" else n, np.nan, np.float32)
            for name in (*floats, "coefficient", "weight", "divergence")
        }
        out |= {"partials": np.full((n, 5 + step.topk), np.nan, np.float32), "logits": part}
        out |= {"totals": np.full(60, np.nan), "maxima": np.full(5, np.nan), "histogram": np.zeros(322, np.int64)}
        out |= {"loss": np.full(1, np.nan, np.float32), "tokens": np.zeros(1, np.int64)}
        a = {name: address(values) for name, values in out.items()}
        shard = LogitsShard(a["logits"], step.dtype, step.columns, part.strides[0] // part.itemsize, 0, vocab)
        statistics = [a[name] for name in floats[:6]]
        objective = TokenObjectiveArguments(
            *(n, step.topk, vocab, address(log_mu), a["log_prob"], address(advantage), a["entropy"], a["collision"]),
            *(address(target), address(mask), address(topk_ids), address(topk_log_mu), a["topk_log_prob"], None),
            *(*step.rule, *limits, a["coefficient"], a["weight"], a["divergence"]),
            *(a[name] for name in ("totals", "maxima", "histogram", "loss", "tokens")),
        )
        backward = BackwardArguments(
            *(shard, n, address(mask), address(target), a["max"], a["log_sum"], a["log_prob"], a["entropy"]),
            *(a["grad_log_prob"], None, step.temperature, a["logits"], part.strides[0] // part.itemsize),
        )
        partials = PartialsArguments(
            *(shard, RowSelection(None, address(mask), n), address(target), address(topk_ids), step.topk),
            *(step.temperature, a["partials"]),
        )
        merge = MergeArguments(a["partials"], 1, n, step.topk, address(mask), *statistics)
        whole = PolicyGradientArguments(
            partials, merge, objective, backward, address(weights), step.scale, a["grad_log_prob"]
        )
        return whole, out

    given = encode(logits, step.dtype)
    two, expected = arguments(aligned_matrix(given, step.offset))
    emulated.row_partials(two.partials, 1)
    emulated.merge_partials(two.merge)
    emulated.token_objective(two.objective, 1)
    scale = np.float32(step.scale) * (np.float32(1) if weights is None else weights)
    expected["grad_log_prob"][:] = expected["coefficient"] * -scale
    emulated.policy_backward(two.backward, 1)

    one, found = arguments(aligned_matrix(given, step.offset))
    for name in ("coefficient", "weight", "divergence"):  # the totals' kernel writes them
        setattr(one.objective, "out_divergence" if name == "divergence" else name, None)
    emulated.policy_gradient(one, step.blocks)
    for name in ("log_prob", "entropy", "collision", "topk_log_prob", "logits"):
        both = [np.ascontiguousarray(results[name]) for results in (expected, found)]
        bits = [values.view(np.uint32 if values.itemsize == 4 else np.uint16) for values in both]
        if not np.array_equal(*bits):
            rows = (bits[0] != bits[1]).reshape(n, -1).any(1).nonzero()[0].tolist()
            yield f"{step}: {name} differs from the two passes' in rows {rows}"


def block_failures(emulated: Any) -> Iterator[str]:
    """How many rows are under way: those that fit into the cache, within limits."""
    arguments = PolicyGradientArguments()
    arguments.partials.logits.num_columns = 151936
    arguments.partials.selection.n = 8192
    for dtype, cache_bytes, expected in (
        (BFLOAT16, 50 << 20, 132),  # H100: 138 rows fit
        (FLOAT32, 50 << 20, 132),  # too large: still one for every multiprocessor
        (BFLOAT16, 126 << 20, 264),  # 347 fit
        (BFLOAT16, 1 << 30, 528),  # four for every one at most
    ):
        arguments.partials.logits.dtype = dtype
        blocks = emulated.policy_gradient_blocks(arguments, 132, cache_bytes)
        if blocks not in (expected, None):
            yield f"{cache_bytes >> 20} MiB, dtype {dtype}: {blocks} rows under way, not {expected}"
