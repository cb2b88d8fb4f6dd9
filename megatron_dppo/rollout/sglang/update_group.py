"""The process group of one sending rank of the trainer and every rank of every server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, distributed_c10d  # type: ignore[attr-defined]


def join_update_group(name: str, store: Store, world_size: int, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """Join the group as rank 0, by the steps that SGLang takes on its side. Waits for the servers.

    ``torch.distributed`` has no public way to make a group with processes outside the trainer's own world, and the
    prefix under which the members find each other in the store must be the same on both sides.
    """
    rendezvous = PrefixStore(name, store)
    with _nothing_to_split_from():
        group, _ = distributed_c10d._new_process_group_helper(
            world_size, 0, [], dist.Backend(backend), rendezvous, group_name=cast(Any, name), timeout=timeout
        )
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


@contextmanager
def _nothing_to_split_from() -> Iterator[None]:
    """Within: new groups over NCCL connect by themselves.

    Where the default group is bound to a device (distributed/ranks.py), torch would split them off its communicator, for
    which it needs all of the trainer's ranks. None but this one is here: it would wait for them for ever.
    """
    default = dist.group.WORLD
    device = None if default is None else default.bound_device_id
    if default is None or device is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = device
