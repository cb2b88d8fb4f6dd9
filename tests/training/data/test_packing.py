"""Which sequences share a micro-batch and where their tokens stand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo.training.data.packing import (
    fewest_packed_groups,
    packed_groups,
    packed_layout,
    padded_groups,
    padded_layout,
    round_up,
)

BUDGET = 100
some_lengths = st.lists(st.integers(1, 130), min_size=1, max_size=40)


def flat(groups: list[list[int]]) -> list[int]:
    return sorted(index for group in groups for index in group)


def test_padded_groups_hold_similar_lengths_longest_first():
    assert padded_groups([7, 1, 6, 2, 3], 2) == [[0, 2], [4, 3], [1]]


@settings(max_examples=40)
@given(some_lengths, st.integers(0, 5))
def test_every_sequence_is_in_one_packed_group_and_no_group_breaks_the_budget(lengths, more_groups):
    count = fewest_packed_groups(lengths, BUDGET) + more_groups
    groups = packed_groups(lengths, BUDGET, count)
    assert len(groups) == count
    assert flat(groups) == list(range(len(lengths)))
    for group in groups:
        assert sum(lengths[i] for i in group) <= BUDGET or len(group) == 1


@settings(max_examples=40)
@given(some_lengths)
def test_few_groups_suffice(lengths):
    """First fit leaves at most one group that is not more than half full."""
    lengths = [min(length, BUDGET) for length in lengths]
    fewest = fewest_packed_groups(lengths, BUDGET)
    assert math.ceil(sum(lengths) / BUDGET) <= fewest
    assert (fewest - 1) * BUDGET < 2 * sum(lengths)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 20), min_size=20, max_size=60), st.integers(2, 5))
def test_groups_with_room_to_choose_are_balanced(lengths, count):
    """Merging two partitions largest-with-smallest never widens the wider spread, which begins as the largest length: 20."""
    totals = [sum(lengths[i] for i in group) for group in packed_groups(lengths, 10_000, count)]
    assert max(totals) - min(totals) <= 20
    assert totals == sorted(totals, reverse=True)


def test_a_tight_fit_keeps_the_budget_rather_than_the_balance():
    # Differencing splits these 8 + 7 + 6 + 5 + 4 as {8, 6} and {7, 5, 4}: 16 tokens. Only {8, 7} and {6, 5, 4} fit 15.
    assert packed_groups([8, 7, 6, 5, 4], 15, 2) == [[0, 1], [2, 3, 4]]


def test_more_groups_than_sequences_leave_some_empty():
    assert packed_groups([5, 3], 10, 3) == [[0], [1], []]


def test_a_packed_row_holds_sequences_end_to_end_and_its_rest_is_a_part_of_its_own():
    layout = packed_layout([3, 5, 2], sequence_multiple=1, row_length=12)
    assert layout.places == ((0, 0), (0, 3), (0, 8))
    assert layout.bounds == (0, 3, 8, 10, 12)
    assert packed_layout([3, 5], sequence_multiple=4, row_length=12).bounds == (0, 4, 12)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_context_parallel_ranks_hold_all_positions_once_in_two_chunks_of_each_sequence(size, packed):
    multiple = 2 * size
    lengths = [5, 13, 2, 9]
    if packed:
        layout = packed_layout(lengths, multiple, sum(round_up(n, multiple) for n in lengths) + multiple)
    else:
        layout = padded_layout(lengths, round_up(13, multiple))
    ranks = [layout.positions_on_rank(size, rank) for rank in range(size)]
    assert torch.cat(ranks).sort().values.tolist() == list(range(layout.length))
    assert len({len(positions) for positions in ranks}) == 1
    # The work of causal queries is their distance from the sequence's start: equal on all ranks but for one chunk's steps.
    start, end = layout.bounds[-2:]
    work = [int((p[(p >= start) & (p < end)] - start).sum()) for p in ranks]
    assert len(set(work)) == 1
