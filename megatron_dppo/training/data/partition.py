"""Dividing sequences among groups: as few groups as a budget of tokens allows, or groups of nearly the same cost."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def fewest_groups(lengths: Sequence[int], budget: int) -> int:
    """A number of groups of at most ``budget`` tokens that suffices; a longer sequence takes a group of its own."""
    return len(_first_fit_decreasing(lengths, budget))


def balanced_groups(costs: Sequence[float], lengths: Sequence[int], budget: int, count: int) -> list[list[int]]:
    """``count >= fewest_groups(lengths, budget)`` groups of nearly the same cost, the most expensive first.

    Groups that take equally long are what ranks that wait for each other need. Where balancing would break the budget,
    sequences go, the most expensive first, to the cheapest group that has room; where even that does not fit, they are
    filled up one by one. There are empty groups if there are fewer sequences than groups.
    """
    groups = _largest_differencing(costs, count)
    if not _fits(groups, lengths, budget):
        groups = _cheapest_with_room(costs, lengths, budget, count) or _first_fit_decreasing(lengths, budget)
        groups += [[] for _ in range(count - len(groups))]
    return sorted((sorted(group) for group in groups), key=lambda group: -sum(costs[index] for index in group))


def _fits(groups: Sequence[Sequence[int]], lengths: Sequence[int], budget: int) -> bool:
    return all(len(group) <= 1 or sum(lengths[index] for index in group) <= budget for group in groups)


def _first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bin packing, longest first, each into the first bin with room: at most 11/9 of the fewest bins possible."""
    groups: list[list[int]] = []
    room = np.full(len(lengths), budget)  # of groups that are there, and of those that may come
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        group = int(np.argmax(room >= min(lengths[index], budget)))
        if group == len(groups):
            groups.append([])
        groups[group].append(index)
        room[group] -= lengths[index]
    return groups


def _cheapest_with_room(
    costs: Sequence[float], lengths: Sequence[int], budget: int, count: int
) -> list[list[int]] | None:
    """None if a sequence finds no group with room."""
    groups: list[list[int]] = [[] for _ in range(count)]
    cost, room = np.zeros(count), np.full(count, budget)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        has_room = room >= min(lengths[index], budget)
        if not has_room.any():
            return None
        group = int(np.argmin(np.where(has_room, cost, np.inf)))
        groups[group].append(index)
        cost[group] += costs[index]
        room[group] -= lengths[index]
    return groups


def _largest_differencing(costs: Sequence[float], count: int) -> list[list[int]]:
    """Partition into ``count`` groups of nearly equal sums (Karmarkar and Karp, 1982).

    Every cost starts as a partition of its own; the two partitions with the widest spread are merged, heaviest groups with
    lightest, until one is left. Who is in which group is followed back from there: a merged group knows the place that it
    had in either half.
    """
    heap: list[tuple[float, int, np.ndarray]] = []  # minus the spread, number, sums of the groups, heaviest first
    for number, cost in enumerate(costs):
        sums = np.zeros(count)
        sums[0] = cost
        heap.append((-(sums[0] - sums[-1]), number, sums))
    heapq.heapify(heap)
    merges: list[tuple[int, int, np.ndarray]] = []  # both halves' numbers; the groups' places in the first half
    for number in range(len(costs), 2 * len(costs) - 1):
        _, first, first_sums = heapq.heappop(heap)
        _, second, second_sums = heapq.heappop(heap)
        sums = first_sums + second_sums[::-1]
        places = np.argsort(-sums, kind="stable")
        sums = sums[places]
        merges.append((first, second, places))
        heapq.heappush(heap, (-(sums[0] - sums[-1]), number, sums))

    groups: list[list[int]] = [[] for _ in range(count)]
    group_at: dict[int, np.ndarray] = {
        2 * len(costs) - 2: np.arange(count)
    }  # of a partition: which group is at a place
    for number in range(2 * len(costs) - 2, len(costs) - 1, -1):
        first, second, places = merges[number - len(costs)]
        in_first = np.empty(count, dtype=np.int64)
        in_first[places] = group_at.pop(number)
        group_at[first], group_at[second] = in_first, in_first[::-1]
    for index in range(len(costs)):
        groups[int(group_at[index][0])].append(index)
    return groups
