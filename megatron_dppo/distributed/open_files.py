"""How many files a process may have open: every rank that it is connected to by gloo takes one."""

from __future__ import annotations

import resource

from megatron_dppo.errors import ConfigError

# Python, the store, data, logs, shared memory, and NCCL's own sockets, which depend on the network and not on the ranks.
_BESIDE = 1024


def make_room_for_sockets(meshes: int, world_size: int) -> None:
    """Raise this process's own limit, as far as it may, for so many groups of all ranks over gloo.

    Raises:
        ConfigError: the system does not allow as many. It would fail in the middle of the start, with an error of gloo's.
    """
    needed = meshes * (world_size - 1) + _BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{world_size} ranks need up to {needed} open files in each process, and the system allows {hard}: raise the hard"
            f" limit (ulimit -Hn {needed} before the job's command, LimitNOFILE= of its service, or --ulimit nofile={needed}"
            " of its container)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
