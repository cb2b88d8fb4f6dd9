"""The process group of one sending rank of the trainer and every rank of every server, and the store where they meet."""

from __future__ import annotations

import socket
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore, distributed_c10d  # type: ignore[attr-defined]

from megatron_dppo.errors import RolloutError


def address_seen_from(url: str) -> str:
    """This machine's address on the route to a server. Nothing is sent: connecting a UDP socket only picks a route."""
    parts = urllib.parse.urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        return str(probe.getsockname()[0])


def open_store(address: str, timeout: timedelta) -> TCPStore:
    """A store at a free port of this address, and of no other that this host has: there is no key to it.

    Raises RolloutError if this host does not have the address.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listener = socket.create_server((address, 0), family=family)
    except OSError as error:
        raise RolloutError(
            f"rollout.sglang.master_address: this host cannot be reached by {address} ({error}): name an address of the host"
            " of the trainer's rank 0"
        ) from error
    port = listener.getsockname()[1]
    return TCPStore(
        address, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


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
