"""Which sequences share a forward pass, and where their tokens stand in it.

Two ways: *padded* groups hold a fixed number of sequences of similar length, one to a row; *packed* groups hold as many
sequences as fit a token budget, end to end in one row. Padding costs the difference between the longest and the mean
length of each group, packing a few tokens at the end of the row.

Under context parallelism every sequence is cut into 2 CP chunks and rank r keeps chunks r and 2 CP - 1 - r: a causal
query's work grows with its position, and this way all ranks get the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch


def padded_groups(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of ``lengths`` in groups of ``size`` (the last may be smaller), similar lengths together, longest first."""
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]


def fewest_packed_groups(lengths: Sequence[int], budget: int) -> int:
    """A number of groups of at most ``budget`` tokens that suffices; a longer sequence takes a group of its own."""
    return len(_first_fit_decreasing(lengths, budget))


def packed_groups(lengths: Sequence[int], budget: int, count: int) -> list[list[int]]:
    """``count >= fewest_packed_groups(lengths, budget)`` groups of nearly the same number of tokens, fullest first.

    Balanced groups take equally long, which is what ranks that wait for each other need. Where balancing would break the
    budget (a tight fit), the groups are filled first-fit-decreasing instead. There are empty groups if there are fewer
    sequences (at least one) than groups.
    """

    def tokens(group: Sequence[int]) -> int:
        return sum(lengths[index] for index in group)

    groups = _largest_differencing(lengths, count)
    if max(map(tokens, groups)) > max(budget, *lengths):
        groups = _first_fit_decreasing(lengths, budget)
        groups += [[] for _ in range(count - len(groups))]
    return sorted((sorted(group) for group in groups), key=tokens, reverse=True)


def _first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bin packing, longest first, each into the first bin with room: at most 11/9 of the fewest bins possible."""
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        for group, left in enumerate(room):
            if lengths[index] <= left:
                groups[group].append(index)
                room[group] -= lengths[index]
                break
        else:
            groups.append([index])
            room.append(budget - lengths[index])
    return groups


def _largest_differencing(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Partition into ``count`` groups of nearly equal sums (Karmarkar and Karp, 1982).

    Every length starts as a partition of its own; the two partitions with the widest spread are merged, heaviest groups
    with lightest, until one is left.
    """
    partitions: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for index, length in enumerate(lengths):
        partition: list[tuple[int, list[int]]] = [(length, [index]), *((0, []) for _ in range(count - 1))]
        partitions.append((_negative_spread(partition), index, partition))
    heapq.heapify(partitions)
    for order in range(len(lengths), 2 * len(lengths) - 1):
        _, _, first = heapq.heappop(partitions)
        _, _, second = heapq.heappop(partitions)
        merged = [(a + b, x + y) for (a, x), (b, y) in zip(first, reversed(second), strict=True)]
        merged.sort(key=lambda group: -group[0])
        heapq.heappush(partitions, (_negative_spread(merged), order, merged))
    return [indices for _, indices in partitions[0][2]]


def _negative_spread(partition: list[tuple[int, list[int]]]) -> int:
    """Groups are sorted by falling sum; heapq pops the smallest."""
    return partition[-1][0] - partition[0][0]


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
