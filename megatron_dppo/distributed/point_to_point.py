"""Sending bytes from one rank to some: to the first of them, who passes them on along a tree.

All of it over one group that spans all ranks: a group of its own for every set of receivers would cost each rank a mesh of
sockets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dppo.distributed.host_group import host_group

# Each part is passed on as soon as it is there: the levels of a tree overlap, and no message is large.
_PART_BYTES = 64 * 2**20
_PARTS_PER_PARCEL = 2**12  # 256 GiB
_TAGS = 2**31


@dataclass(frozen=True)
class Parcel:
    """Bytes on their way.

    Attributes:
        source: global rank that has them.
        receivers: global ranks that get them, in the order in which they pass them on. If the source is one, it is the first.
        num_bytes: how many.
    """

    source: int
    receivers: tuple[int, ...]
    num_bytes: int

    def parent(self, receiver: int) -> int | None:
        """Who sends to this receiver; None if it is the source."""
        place = self.receivers.index(receiver)
        if place == 0:
            return None if receiver == self.source else self.source
        return self.receivers[place - (1 << (place.bit_length() - 1))]

    def children(self, sender: int) -> tuple[int, ...]:
        """To whom this rank sends."""
        if sender not in self.receivers:
            return self.receivers[:1]
        place, step, found = self.receivers.index(sender), 1, []
        while (child := place + step) < len(self.receivers):
            if step > place:
                found.append(self.receivers[child])
            step *= 2
        return tuple(reversed(found))  # who has most to pass on comes first


def deliver(parcels: Sequence[Parcel], contents: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Send every parcel to its receivers, by way of ``host_group``. Collective: every rank gives the same ``parcels``.

    Args:
        parcels: what is to be sent.
        contents: index of a parcel -> [num_bytes] uint8 on the CPU, for those that this rank is the source of.

    Returns:
        index -> [num_bytes] uint8, for those that this rank is a receiver of. What it has already is not copied.
    """
    group = host_group()
    me = dist.get_rank() if dist.is_initialized() else 0
    received: dict[int, torch.Tensor] = {}
    arriving: list[tuple[int, list[dist.Work | None]]] = []
    for index, parcel in enumerate(parcels):
        if me == parcel.source:
            content = contents[index]
            if content.dtype != torch.uint8 or content.shape != (parcel.num_bytes,):
                raise ValueError(f"parcel {index}: {content.dtype} {tuple(content.shape)} for {parcel.num_bytes} bytes")
        if me in parcel.receivers:
            parent = parcel.parent(me)
            if parent is None:
                received[index] = contents[index]
            else:
                buffer = received[index] = torch.empty(parcel.num_bytes, dtype=torch.uint8, device="cpu")
                arriving.append((index, [dist.irecv(part, parent, group, tag) for part, tag in _parts(buffer, index)]))
    sending: list[dist.Work | None] = []
    for index, parcel in enumerate(parcels):
        if me == parcel.source:
            for part, tag in _parts(contents[index], index):
                sending += [dist.isend(part, child, group, tag) for child in parcel.children(me)]
    # In the order of parcels on every rank: what a rank waits for is never held up by what its sender waits for.
    for index, works in arriving:
        for (part, tag), work in zip(_parts(received[index], index), works, strict=True):
            _finish(work)
            sending += [dist.isend(part, child, group, tag) for child in parcels[index].children(me)]
    for work in sending:
        _finish(work)
    return received


def _finish(work: dist.Work | None) -> None:
    assert work is not None  # it would be, on a rank outside of the group
    work.wait()


def _parts(content: torch.Tensor, index: int) -> list[tuple[torch.Tensor, int]]:
    """Of one parcel, each with its tag."""
    if not len(content):
        return []
    return [(part, (index * _PARTS_PER_PARCEL + i) % _TAGS) for i, part in enumerate(content.split(_PART_BYTES))]
