"""A rank of a world that is not there: process groups of its true size that connect to nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_dppo.distributed import host_group
from megatron_dppo.distributed.layout import initialize_model_parallel
from megatron_dppo.distributed.parallel_config import ParallelConfig


@dataclass
class Groups:
    """Sizes of the process groups of more than one rank that a rank is in.

    Attributes:
        tensors: those that carry tensors: NCCL's, the default one among them.
        values: those over gloo, in which each pair of ranks has a socket.
    """

    tensors: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)


@contextmanager
def fake_world(parallel: ParallelConfig, world_size: int, rank: int) -> Iterator[Groups]:
    """Within: this process is rank ``rank`` of ``world_size``, with Megatron's groups and nobody else. Collectives return at
    once. Raises RuntimeError where torch.distributed is in use.
    """
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a plan needs a process without process groups")
    groups = Groups(tensors=[world_size] if world_size > 1 else [])
    new_group = dist.new_group

    def counting(ranks: Any = None, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        members = range(world_size) if ranks is None else ranks
        if rank in members and len(members) > 1:
            (groups.values if backend == "gloo" else groups.tensors).append(len(members))
        arguments = {**kwargs, "backend": "fake"}  # whose store cannot serve gloo
        return new_group(ranks, *args, **arguments)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            mock.patch.object(dist, "new_group", counting),
            mock.patch.object(dist.distributed_c10d, "new_group", counting),
            host_group.made_host_group(10.0),
        ):
            initialize_model_parallel(parallel, seed=1)
            yield groups
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
