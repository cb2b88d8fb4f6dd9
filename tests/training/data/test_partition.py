"""Dividing sequences among groups: a budget kept, the work of the groups balanced."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo.training.data.partition import balanced_groups, fewest_groups

BUDGET = 100
some_lengths = st.lists(st.integers(1, 130), min_size=1, max_size=40)


def quadratic(lengths: list[int]) -> list[float]:
    return [length + length**2 / 20 for length in lengths]


@settings(max_examples=60)
@given(some_lengths, st.integers(0, 5))
def test_every_sequence_is_in_one_group_and_no_group_breaks_the_budget(lengths, more_groups):
    count = fewest_groups(lengths, BUDGET) + more_groups
    for costs in (lengths, quadratic(lengths)):
        groups = balanced_groups(costs, lengths, BUDGET, count)
        assert len(groups) == count
        assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
        for group in groups:
            assert sum(lengths[i] for i in group) <= BUDGET or len(group) == 1


@settings(max_examples=40)
@given(some_lengths)
def test_few_groups_suffice(lengths):
    """First fit leaves at most one group that is not more than half full."""
    lengths = [min(length, BUDGET) for length in lengths]
    fewest = fewest_groups(lengths, BUDGET)
    assert math.ceil(sum(lengths) / BUDGET) <= fewest
    assert (fewest - 1) * BUDGET < 2 * sum(lengths)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 20), min_size=20, max_size=60), st.integers(2, 5))
def test_groups_with_room_to_choose_cost_the_same_the_most_expensive_first(lengths, count):
    """Merging two partitions largest-with-smallest never widens the wider spread, which begins as the largest cost."""
    costs = quadratic(lengths)
    totals = [sum(costs[i] for i in group) for group in balanced_groups(costs, lengths, 10_000, count)]
    assert max(totals) - min(totals) <= max(costs) + 1e-9
    assert totals == sorted(totals, reverse=True)


def test_differencing_is_karmarkars_and_karps():
    """Their own example: 8, 7, 6, 5, 4 in two groups, where taking the largest first gives 17 and 13."""
    groups = balanced_groups([8, 7, 6, 5, 4], [1] * 5, 5, 2)
    assert [sum((8, 7, 6, 5, 4)[i] for i in group) for group in groups] == [16, 14]


def test_a_tight_fit_keeps_the_budget_rather_than_the_balance():
    # Differencing splits these as {8, 6} and {7, 5, 4}: 16 tokens. Only {8, 7} and {6, 5, 4} fit 15.
    assert balanced_groups([8, 7, 6, 5, 4], [8, 7, 6, 5, 4], 15, 2) == [[0, 1], [2, 3, 4]]


def test_where_differencing_breaks_the_budget_the_cheapest_group_with_room_is_next():
    # Differencing ends at {9, 4, 3} and {7, 5, 4}: 16 of 16 tokens each but for the budget of the first, 15.
    lengths = [9, 7, 5, 4, 4, 2]
    groups = balanced_groups(lengths, lengths, 16, 2)
    assert sorted(sum(lengths[i] for i in group) for group in groups) == [15, 16]


def test_more_groups_than_sequences_leave_some_empty():
    assert balanced_groups([5, 3], [5, 3], 10, 3) == [[0], [1], []]
