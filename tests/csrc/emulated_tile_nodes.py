"""The emulated kernels that reduce logits in an order that no layout changes, against float64 and with themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from emulation_library import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    TILE_COLUMNS,
    LogitsShard,
    MergeArguments,
    MergeNodesArguments,
    PartialsArguments,
    RowSelection,
    TileNodesArguments,
    address,
    aligned_matrix,
    count_nodes,
    decode,
    encode,
)

ROWS = 6
NAMES = ("log_prob", "entropy", "collision", "topk_log_prob", "max", "log_sum")


@dataclass(frozen=True)
class Case:
    """``ROWS`` rows of a vocabulary, in each of so many shards; the second is masked and holds NaN."""

    vocab_size: int
    dtype: int
    shards: tuple[int, ...]
    temperature: float = 1.0
    offset: int = 0  # elements by which every row misses a 16-byte boundary, where there is more than one shard


CASES = (
    # More than one group of 32 tiles; groups, tiles and vectors that are not full; an empty shard.
    Case(70 * TILE_COLUMNS + 5, BFLOAT16, (1, 3), offset=3),
    Case(301, FLOAT32, (1, 4), temperature=0.7, offset=1),
    Case(100, FLOAT16, (1, 2)),
)
# Few fibers: the blocks of a row's nodes, and the row that is masked.
INTERBLOCK_CASES = (Case(300, FLOAT32, (1, 2)),)


def tile_nodes_failures(emulated: Any, case: Case) -> Iterator[str]:
    """Whatever is further from float64 than fp32 allows, or other bits with another number of shards."""
    random = np.random.default_rng(5)
    values = random.normal(0, 3, (ROWS, case.vocab_size))
    # Where the largest has most of the probability, the logarithm of the sum keeps the sum's last bits.
    peaks = np.log(np.exp(values[3:]).sum(1)) + 1.0
    values[np.arange(3, ROWS), random.integers(0, case.vocab_size, ROWS - 3)] = peaks
    values[2, : 2 * TILE_COLUMNS] = -np.inf  # a tile without probability, where there is another
    values[2, -1] = 1.0
    values[1] = np.nan
    logits, mask = encode(values, case.dtype), np.arange(ROWS) != 1
    target = np.array([0, -100, case.vocab_size - 1, 1, 2, case.vocab_size // 2], np.int64)
    topk_ids = np.stack([target, np.full(ROWS, case.vocab_size - 1)], 1)
    results = [_merged(emulated, case, shards, logits, mask, target, topk_ids) for shards in case.shards]
    for shards, result in zip(case.shards[1:], results[1:], strict=True):
        for name in NAMES:
            if result[name].tobytes() != results[0][name].tobytes():
                yield f"{case}: {name} has other bits in {shards} shards"
    if any(values[1].any() for values in results[0].values()):
        yield f"{case}: the results of a masked row are not 0"

    z = decode(logits, case.dtype)[mask] / np.float64(np.float32(case.temperature))
    top = z.max(1, keepdims=True)
    log_sum = np.log(np.exp(z - top).sum(1, keepdims=True))
    log_p = z - top - log_sum
    p = np.exp(log_p)
    expected = {
        "log_prob": np.take_along_axis(log_p, target[mask][:, None], 1)[:, 0],
        "entropy": -np.where(p > 0, p * np.where(p > 0, log_p, 0.0), 0.0).sum(1),
        "collision": (p * p).sum(1),
        "topk_log_prob": np.take_along_axis(log_p, topk_ids[mask], 1),
        "max": top[:, 0],
        "log_sum": log_sum[:, 0],
    }
    # z is rounded to fp32, and so is each of the few sums that a term passes through, of numbers up to the largest here.
    size = max(np.abs(values[np.isfinite(values)]).max(initial=0.0) for values in (z, *expected.values()))
    for name, value in expected.items():
        got = results[0][name][mask]
        wrong = np.where(np.isfinite(value), np.abs(got - value) > size * 2.0**-20, got != value)
        if wrong.any():
            yield f"{case}: {name} of nodes is off by {np.abs(got - value)[wrong].max():.1e}"


def _merged(
    emulated: Any,
    case: Case,
    shards: int,
    logits: np.ndarray,
    mask: np.ndarray,
    target: np.ndarray,
    topk_ids: np.ndarray,
) -> dict[str, np.ndarray]:
    rows, topk = topk_ids.shape
    tiles = -(-case.vocab_size // (TILE_COLUMNS * shards))
    # One shard may end in the middle of a tile.
    width = case.vocab_size if shards == 1 else tiles * TILE_COLUMNS
    nodes = max(count_nodes(r * tiles, (r + 1) * tiles) for r in range(shards))
    partials = np.full((shards, rows, 4 * nodes + 1 + topk), np.nan, np.float32)
    padded = np.pad(logits, ((0, 0), (0, shards * width - case.vocab_size)), constant_values=7)
    for r in range(shards):
        part = aligned_matrix(padded[:, r * width : (r + 1) * width], case.offset if shards > 1 else 0)
        stride = part.strides[0] // part.itemsize
        num_columns = min(max(case.vocab_size - r * width, 0), width)
        shard = LogitsShard(part.ctypes.data, case.dtype, width, stride, r * width, num_columns)
        selection = RowSelection(None, address(mask), rows)
        places = (address(target), address(topk_ids), topk, case.temperature, address(partials[r]))
        emulated.tile_nodes(TileNodesArguments(PartialsArguments(shard, selection, *places), tiles, nodes))
    outputs = {name: np.full((rows, topk) if name == "topk_log_prob" else rows, np.nan, np.float32) for name in NAMES}
    merge = MergeArguments(address(partials), shards, rows, topk, address(mask), *map(address, outputs.values()))
    emulated.merge_tile_nodes(MergeNodesArguments(merge, tiles, nodes, case.temperature, None))
    return outputs
