"""How many files a process may have open: every rank that it is connected to by gloo takes one, and every request."""

from __future__ import annotations

import os
import resource

from megatron_dppo.errors import ConfigError

# Python, the store, data, logs, shared memory, and NCCL's own sockets, which depend on the network and not on the ranks.
_BESIDE = 1024


def make_room_for_sockets(meshes: int, world_size: int) -> None:
    """Raise this process's own limit, as far as it may, for so many groups of all ranks over gloo.

    Raises:
        ConfigError: the system does not allow as many. It would fail in the middle of the start, with an error of gloo's.
    """
    _raise_limit(meshes * (world_size - 1) + _BESIDE, f"{world_size} ranks need")


def make_room_for_requests(count: int) -> None:
    """Likewise for so many requests at once, beside what is open now."""
    _raise_limit(len(os.listdir("/proc/self/fd")) + count + _BESIDE, f"{count} requests at once need")


def _raise_limit(needed: int, by_whom: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{by_whom} up to {needed} open files in each process, and the system allows {hard}: raise the hard limit"
            f" (ulimit -Hn {needed} before the job's command, LimitNOFILE= of its service, or --ulimit nofile={needed} of its"
            " container)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
