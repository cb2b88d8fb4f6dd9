"""Bytes from one rank to some: everybody gets what is theirs, passed on along a tree, and nobody more."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_dppo.distributed import point_to_point
from megatron_dppo.distributed.point_to_point import Parcel, deliver
from tests.rank_pool import RankPools


@given(st.integers(1, 70), st.booleans())
def test_a_parcel_reaches_every_receiver_once_in_logarithmic_time(receivers: int, source_receives: bool) -> None:
    ranks = tuple(range(receivers))
    parcel = Parcel(0 if source_receives else 99, ranks, 1)
    hops = {parcel.source: 0}
    waiting = [parcel.source]
    while waiting:
        sender = waiting.pop(0)
        for child in parcel.children(sender):
            assert child not in hops
            assert parcel.parent(child) == sender
            hops[child] = hops[sender] + 1
            waiting.append(child)
    assert hops.keys() == {*ranks, parcel.source}
    assert max(hops.values()) <= receivers.bit_length() + 1
    if not source_receives:
        assert len(parcel.children(99)) == 1  # once over the network, however many ranks share it there


def _content(index: int, size: int) -> torch.Tensor:
    return torch.arange(size).add(31 * index).remainder(251).to(torch.uint8)


PARCELS = [
    Parcel(0, (0, 1, 2), 1000),  # the source is one of the receivers
    Parcel(1, (2,), 17),
    Parcel(2, (0, 1), 130),
    Parcel(2, (1, 2, 0), 0),
    Parcel(1, (1,), 64),  # stays where it is
    Parcel(0, (2, 1), 1001),
]


def _deliver_all() -> list[int]:
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(point_to_point, "_PART_BYTES", 64)  # many parts, and a shorter last one
        contents = {i: _content(i, parcel.num_bytes) for i, parcel in enumerate(PARCELS) if parcel.source == rank}
        received = deliver(PARCELS, contents)
    for index, values in received.items():
        assert torch.equal(values, _content(index, PARCELS[index].num_bytes))
    assert 4 not in received or received[4] is contents[4]  # nothing is copied that is there already
    return sorted(received)


def test_ranks_get_what_is_theirs_and_nothing_else(ranks: RankPools) -> None:
    assert ranks(3).run(_deliver_all) == [[0, 2, 3], [0, 2, 3, 4, 5], [0, 1, 3, 5]]


def _send_other_than_announced() -> str:
    with pytest.raises(ValueError, match="parcel 0") as raised:
        deliver([Parcel(0, (0,), 4)], {0: torch.zeros(4)})
    return str(raised.value)


def test_content_that_is_not_what_the_parcel_says_is_refused(ranks: RankPools) -> None:
    assert ranks(1).run(_send_other_than_announced) == ["parcel 0: torch.float32 (4,) for 4 bytes"]
