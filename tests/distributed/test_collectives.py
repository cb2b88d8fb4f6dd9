"""One rank's outcome on all ranks, sums and maxima: with real groups, and without any."""

from __future__ import annotations

import pickle
import threading
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_dppo.distributed.collectives import (
    broadcast_bytes,
    broadcast_object,
    first_error,
    first_rank_where,
    gather_objects,
    max_over_ranks,
    on_one_rank,
    portable_error,
    sum_over_ranks,
)
from megatron_dppo.errors import CheckpointError, RolloutError


class OnlyHereError(Exception):
    """Stands for an exception of a package that other ranks lack."""


def _outcome(action: Any, **arguments: Any) -> tuple[str, str]:
    try:
        return "result", repr(on_one_rank(action, **arguments))
    except Exception as error:
        return type(error).__name__, str(error)


def _raise(error: Exception) -> None:
    raise error


def _outcomes(rank: int) -> list[Any]:
    me, calls = dist.get_rank(), []

    def act() -> dict[str, int]:
        calls.append(me)
        return {"by": me}

    return [
        _outcome(act, rank=rank),
        calls,
        _outcome(lambda: None, rank=rank),
        _outcome(lambda: _raise(RolloutError("no server")), rank=rank),
        _outcome(lambda: _raise(FileNotFoundError(2, "no such file", "x")), rank=rank),
        _outcome(lambda: _raise(OnlyHereError("strange")), rank=rank),
        _outcome(threading.Lock, rank=rank),
        _outcome(lambda: _raise(OSError("full")), rank=rank, failure=lambda e: CheckpointError(f"saving: {e}")),
        _outcome(act, rank=rank),  # what failed before has left nobody waiting
    ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_see_the_result_or_the_error_of_the_one_that_acted(ranks, world_size):
    results = ranks(world_size).run(_outcomes, world_size - 1)
    for number, result in enumerate(results):
        done, calls, nothing, ours, builtin, foreign, unpicklable, converted, again = result
        assert done == again == ("result", f"{{'by': {world_size - 1}}}")
        assert calls == ([number, number] if number == world_size - 1 else [])
        assert nothing == ("result", "None")
        assert ours == ("RolloutError", "no server")
        assert builtin == ("FileNotFoundError", "[Errno 2] no such file: 'x'")
        assert foreign == ("RuntimeError", "OnlyHereError: strange")
        assert unpicklable[0] == "TypeError"
        assert "pickle" in unpicklable[1]
        assert converted == ("CheckpointError", "saving: full")
        assert result[2:] == results[0][2:]


def _within_a_group() -> list[Any]:
    """Ranks 0 and 2 of three, whose ranks in the group are 0 and 1."""
    group, _ = dist.new_subgroups_by_enumeration([[0, 2], [1]])
    assert group is not None
    return [
        dist.get_process_group_ranks(group),
        on_one_rank(dist.get_rank, rank=group.size() - 1, group=group),
        broadcast_object(dist.get_rank(), rank=group.size() - 1, group=group),
        broadcast_bytes(b"%d" % dist.get_rank(), rank=group.size() - 1, group=group),
        gather_objects(dist.get_rank(), group=group),
        first_rank_where(dist.get_rank() > 0, group=group),
        sum_over_ranks([dist.get_rank(), 1], group=group),
        max_over_ranks([dist.get_rank(), -dist.get_rank()], group=group),
    ]


def test_ranks_are_counted_within_the_group(ranks):
    outer = [[0, 2], 2, 2, b"2", [0, 2], 1, [2.0, 2.0], [2.0, 0.0]]
    assert ranks(3).run(_within_a_group) == [outer, [[1], 1, 1, b"1", [1], 0, [1.0, 1.0], [1.0, -1.0]], outer]


def _payload_sent(size: int) -> tuple[list[str], int]:
    """Names of the collectives of one call, and the bytes that this rank received in them."""
    names: list[str] = []
    received = 0
    broadcast, me = dist.broadcast, dist.get_rank()

    def counted(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        nonlocal received
        names.append("broadcast")
        received += tensor.nbytes if me else 0
        return broadcast(tensor, *arguments, **named)

    def gathered(*arguments: Any, **named: Any) -> None:
        names.append("gather")

    module = "torch.distributed.distributed_c10d"
    with patch(f"{module}.broadcast", counted), patch(f"{module}.all_gather", gathered):
        assert on_one_rank(lambda: bytes(size)) == bytes(size)
    return names, received


def test_every_rank_receives_the_result_once(ranks):
    """An all-gather would give each rank as many slots of this size as there are ranks."""
    size = 1_000_000
    sent = len(pickle.dumps(bytes(size)))
    for rank, (names, received) in enumerate(ranks(3).run(_payload_sent, size)):
        assert set(names) == {"broadcast"}
        assert received == 0 if rank == 0 else sent <= received < sent + 1000


def _agree(failing: tuple[int, ...]) -> str:
    me = dist.get_rank()
    return repr(first_error(OnlyHereError(f"on {me}") if me in failing else None))


def test_the_first_of_several_failures_is_what_all_ranks_report(ranks):
    assert ranks(3).run(_agree, ()) == ["None"] * 3
    assert ranks(3).run(_agree, (2, 1)) == ["RuntimeError('OnlyHereError: on 1')"] * 3


def test_without_torch_distributed_this_process_is_alone():
    assert on_one_rank(lambda: 7) == 7
    assert on_one_rank(threading.Lock).acquire()  # nothing is pickled
    with pytest.raises(RuntimeError, match="OnlyHereError: strange") as caught:
        on_one_rank(lambda: _raise(OnlyHereError("strange")))
    assert isinstance(caught.value.__cause__, OnlyHereError)
    assert broadcast_object("x") == "x"
    assert broadcast_bytes(b"x") == b"x"
    assert gather_objects("x") == ["x"]
    assert first_rank_where(True) == 0
    assert (sum_over_ranks([1, 2.5]), max_over_ranks([-1])) == ([1.0, 2.5], [-1.0])
    with pytest.raises(ValueError, match="not in list"):
        first_rank_where(False)


def test_an_error_that_holds_what_cannot_travel_is_told_in_words():
    error = ValueError("no", threading.Lock())
    assert type(portable_error(error)) is RuntimeError
    same = ValueError("no")
    assert portable_error(same) is same
