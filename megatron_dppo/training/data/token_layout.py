"""Where the tokens of a micro-batch's sequences stand.

Two ways: *padded*, one sequence to a row, and *packed*, all sequences end to end in one row. Padding costs the difference
between the longest and the mean length, packing a few tokens at the end of the row.

Under context parallelism every sequence is cut into 2 CP chunks and rank r keeps chunks r and 2 CP - 1 - r: a causal
query's work grows with its position, and this way all ranks get the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch


@dataclass(frozen=True)
class TokenLayout:
    """Where sequences stand in the [rows, length] tensors of one micro-batch, before any cut over context-parallel ranks.

    Attributes:
        rows: B.
        length: S.
        places: (row, first position) of each sequence.
        bounds: positions that divide every row into the parts that context parallelism cuts up: (0, S) if padded; if packed
            the end of each sequence with its padding, as in ``cu_seqlens``.
        packed: whether the parts are sequences that must not attend to each other.
    """

    rows: int
    length: int
    places: tuple[tuple[int, int], ...]
    bounds: tuple[int, ...]
    packed: bool

    def positions_on_rank(self, context_parallel_size: int, context_parallel_rank: int) -> torch.Tensor:
        """[S / CP] int64: the positions that one context-parallel rank computes, in its order."""
        parts = []
        for start, end in pairwise(self.bounds):
            chunk = (end - start) // (2 * context_parallel_size)
            for index in (context_parallel_rank, 2 * context_parallel_size - 1 - context_parallel_rank):
                parts.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
        return torch.cat(parts)


def padded_layout(lengths: Sequence[int], row_length: int) -> TokenLayout:
    """One sequence to a row."""
    places = tuple((row, 0) for row in range(len(lengths)))
    return TokenLayout(len(lengths), row_length, places, (0, row_length), packed=False)


def packed_layout(lengths: Sequence[int], sequence_multiple: int, row_length: int) -> TokenLayout:
    """All sequences in one row, each padded to ``sequence_multiple``; what is left of the row is a part of its own."""
    ends = [0, *accumulate(round_up(length, sequence_multiple) for length in lengths)]
    bounds = ends if ends[-1] == row_length else [*ends, row_length]
    return TokenLayout(1, row_length, tuple((0, start) for start in ends[:-1]), tuple(bounds), packed=True)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple
