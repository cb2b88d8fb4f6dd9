"""How many groups and sockets a large run takes, counted on fake ranks; and the group over which values travel."""

from __future__ import annotations

import resource
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dppo.distributed import host_group as host
from megatron_dppo.distributed.collectives import broadcast_bytes, gather_bytes, gather_objects
from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel, replica_group
from megatron_dppo.distributed.open_files import make_room_for_sockets
from megatron_dppo.distributed.point_to_point import Parcel, deliver
from megatron_dppo.errors import ConfigError
from tests.forked_ranks import forkserver

WORLD = 512
LARGE = ParallelConfig(tensor_model_parallel_size=4, expert_model_parallel_size=8, expert_tensor_parallel_size=1)
DEEP = ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=4, context_parallel_size=2)


class Counted(NamedTuple):
    gloo: list[int]  # sizes of the groups over gloo that a rank is in
    others: list[int]  # and of those over the default backend
    replica: list[int]


def _count(parallel: ParallelConfig, rank: int) -> Counted:
    """What rank ``rank`` of 512 makes where NCCL is the default backend: fake groups, which connect to nobody."""
    counted = Counted([], [], [])
    new_group = dist.new_group

    def counting(ranks: Any = None, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        members = range(WORLD) if ranks is None else ranks
        if rank in members and len(members) > 1:
            (counted.gloo if backend == "gloo" else counted.others).append(len(members))
        return new_group(ranks, *args, backend="fake", **kwargs)

    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(dist, "new_group", counting)
        patch.setattr(dist.distributed_c10d, "new_group", counting)
        stack.enter_context(host.made_host_group(10.0))
        initialize_model_parallel(parallel, seed=1)
        counted.replica.extend(dist.get_process_group_ranks(replica_group()))
    return counted


@pytest.fixture
def alone():
    """``alone(function, *arguments)`` -> what it returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=forkserver(), max_tasks_per_child=1) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)


@pytest.mark.parametrize(("parallel", "rank"), [(LARGE, 0), (LARGE, 511), (DEEP, 77)])
def test_one_rank_of_512_is_in_one_group_over_gloo(alone, parallel, rank):
    """511 pairs, and 511 more if checkpoints are written by a thread. Each of Megatron's groups had a mesh of its own, and
    its data-parallel groups two.
    """
    counted = alone(_count, parallel, rank)
    assert counted.gloo == [WORLD]
    assert len(counted.others) < 32
    assert len(counted.replica) == parallel.replica_size
    assert rank in counted.replica


def _values_without_the_default_group() -> list[Any]:
    """Values, bytes and parcels, where the default group carries nothing."""
    me = dist.get_rank()
    with host.made_host_group(60.0), pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "isend", "irecv"):
            patch.setattr(dist, name, _refusing_the_default_group(getattr(dist, name)))
        parcel = Parcel(source=0, receivers=(1,), num_bytes=3)
        contents = {0: torch.tensor([1, 2, 3], dtype=torch.uint8)} if me == 0 else {}
        return [
            gather_objects(me),
            gather_bytes(b"%d" % me),
            broadcast_bytes(b"%d" % me, rank=1),
            [tensor.tolist() for tensor in deliver([parcel], contents).values()],
        ]


def _refusing_the_default_group(collective: Any) -> Any:
    def checked(*args: Any, **kwargs: Any) -> Any:
        groups = [value for value in (*args, *kwargs.values()) if isinstance(value, dist.ProcessGroup)]
        assert groups == [host.host_group()], f"{collective.__name__} over the default group"
        return collective(*args, **kwargs)

    return checked


def test_values_travel_over_the_host_group(ranks):
    results = ranks(2).run(_values_without_the_default_group)
    assert results[0] == [[0, 1], [b"0", b"1"], b"1", []]
    assert results[1] == [[0, 1], [b"0", b"1"], b"1", [[1, 2, 3]]]


def _limits_after(limits: tuple[int, int], meshes: int, world_size: int) -> tuple[int, int] | str:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)  # of a process that ends with the test
    try:
        make_room_for_sockets(meshes, world_size)
    except ConfigError as error:
        return str(error)
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_the_limit_of_open_files_is_raised_or_the_run_refused(alone):
    assert alone(_limits_after, (2048, 4096), 2, 512) == (2048, 4096)
    assert alone(_limits_after, (1500, 4096), 2, 512) == (2 * 511 + 1024, 4096)
    message = alone(_limits_after, (1024, 2000), 2, 512)
    assert message.startswith("512 ranks need up to 2046 open files in each process, and the system allows 2000")
