"""The group by which ranks tell each other Python values: all of them, over gloo, whatever carries the tensors.

There is one such group, made by ``joined_ranks``. A backend that carries CPU tensors as well (``cpu:gloo,cuda:nccl``) as the
default would give each of Megatron's some twenty groups a mesh of sockets of its own. ``None`` where a program made its
default group itself: that one is used then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

_host_group: dist.ProcessGroup | None = None


def host_group() -> dist.ProcessGroup | None:
    """All ranks by way of gloo; None: the default group."""
    return _host_group


@contextmanager
def made_host_group(timeout_s: float) -> Iterator[None]:
    """Within: there is one, whose ranks wait so long for each other. Collective. It goes when the default group does."""
    global _host_group
    _host_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        _host_group = None
