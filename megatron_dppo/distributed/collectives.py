"""The few collectives on Python values: one rank's value or outcome on all ranks, all ranks' values on each, sums, maxima.

``group=None`` means all ranks, by way of gloo (``host_group``), and this process alone where torch.distributed is not
initialised. Nothing waits for a device then. Other groups are for what is done once: where one of them carries the tensors
of a device only, values travel over the device. Ranks are counted within the group.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_dppo import errors
from megatron_dppo.distributed.host_group import host_group

T = TypeVar("T")


def broadcast_object(value: T, *, rank: int = 0, group: dist.ProcessGroup | None = None) -> T:
    """The ``value`` that ``rank`` gave, on every rank; what the others give is ignored."""
    if _size(group) == 1:
        return value
    box: list[Any] = [value if _rank(group) == rank else None]
    dist.broadcast_object_list(box, src=_global_rank(rank, group), group=_resolved(group))
    return box[0]


def broadcast_bytes(payload: bytes, *, rank: int = 0, group: dist.ProcessGroup | None = None) -> bytes:
    """The ``payload``, of any length, that ``rank`` gave, on every rank; what the others give is ignored."""
    if _size(group) == 1:
        return payload
    source, device = _global_rank(rank, group), _device(group)
    length = torch.tensor([len(payload)], device=device)
    dist.broadcast(length, source, group=_resolved(group))
    content = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if _rank(group) == rank and payload:
        content.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(content, source, group=_resolved(group))
    return content.cpu().numpy().tobytes()


def gather_objects(value: T, *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank. For small ones: each takes as much memory as the largest."""
    if _size(group) == 1:
        return [value]
    gathered: list[Any] = [None] * _size(group)
    dist.all_gather_object(gathered, value, group=_resolved(group))
    return gathered


def gather_bytes(payload: bytes, *, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Every rank's bytes, of any length, in the order of ranks, on every rank. Takes as much as the longest for each."""
    if _size(group) == 1:
        return [payload]
    device = _device(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(_size(group))]
    dist.all_gather(lengths, torch.tensor([len(payload)], device=device), group=_resolved(group))
    longest = max(int(length) for length in lengths)
    mine = torch.zeros(longest, dtype=torch.uint8, device="cpu")
    mine[: len(payload)] = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[: len(payload)]
    gathered = [torch.empty_like(mine, device=device) for _ in lengths]
    dist.all_gather(gathered, mine.to(device), group=_resolved(group))
    return [bytes(of_rank[: int(length)].cpu().numpy()) for of_rank, length in zip(gathered, lengths, strict=True)]


def first_rank_where(condition: bool, *, group: dist.ProcessGroup | None = None) -> int:
    """The first rank on which ``condition`` holds. Raises ValueError, on every rank, if there is none."""
    return gather_objects(bool(condition), group=group).index(True)


def on_one_rank(
    action: Callable[[], T],
    *,
    rank: int = 0,
    group: dist.ProcessGroup | None = None,
    failure: Callable[[Exception], Exception] | None = None,
) -> T:
    """Run ``action`` on one rank, and return its result, or raise its error, on all of them.

    Each rank receives the outcome once, and a rank that waits for it is never left waiting by an error of ``action``.

    Args:
        action: called on ``rank`` only; its result must be picklable where there is more than one rank.
        rank: within ``group``.
        group: the ranks that call this together.
        failure: turns what ``action`` raised into what every rank raises. It has to be an exception that other ranks can
            unpickle. Default: ``portable_error``.
    """
    acts = _rank(group) == rank
    result: Any = None
    cause: Exception | None = None
    error: Exception | None = None
    if acts:
        try:
            result = action()
        except Exception as caught:
            cause, error = caught, (failure or portable_error)(caught)
    try:
        result, error = broadcast_object((result, error), rank=rank, group=group)
    except (pickle.PicklingError, AttributeError, TypeError) as caught:
        if not acts:
            raise
        # The result cannot be pickled, which is found before anything is sent: the other ranks still wait.
        cause, error = caught, portable_error(caught)
        broadcast_object((None, error), rank=rank, group=group)
    if error is None:
        return result  # type: ignore[no-any-return]
    if error is cause:
        raise error
    raise error from cause


def first_error(error: Exception | None, *, group: dist.ProcessGroup | None = None) -> Exception | None:
    """What the first of the ranks that failed has to report, on every rank; None if none failed.

    ``error`` is what this rank met, made portable by the caller or else by ``portable_error``.
    """
    mine = None if error is None else portable_error(error)
    return next((found for found in gather_objects(mine, group=group) if found is not None), None)


def attempted(action: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Its result on each rank, where all ranks run it; where it fails on one, the first one's error on all of them."""
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    failure = first_error(error, group=group)
    if failure is not None:
        raise failure from error
    return result


def portable_error(error: Exception) -> Exception:
    """``error`` itself if its class is Python's or this package's, else a RuntimeError that names class and message.

    Another rank may not have the class of any other exception, or not the classes of what it holds.
    """
    if type(error).__module__ in ("builtins", errors.__name__):
        try:
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:
            pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def sum_over_ranks(values: Sequence[float], *, group: dist.ProcessGroup | None = None) -> list[float]:
    """The sum of each value over the ranks, in float64."""
    return _reduce(values, dist.ReduceOp.SUM, group)


def max_over_ranks(values: Sequence[float], *, group: dist.ProcessGroup | None = None) -> list[float]:
    """The largest of each value over the ranks, in float64."""
    return _reduce(values, dist.ReduceOp.MAX, group)


def _reduce(
    values: Sequence[float], operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> list[float]:
    totals = torch.tensor(values, dtype=torch.float64, device=_device(group))
    if _size(group) > 1:
        dist.all_reduce(totals, op=operation, group=_resolved(group))
    return [float(total) for total in totals]


def _resolved(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return host_group() if group is None else group


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors have to be that ``group`` carries."""
    if not dist.is_initialized() or "gloo" in dist.get_backend_config(_resolved(group)):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _global_rank(rank: int, group: dist.ProcessGroup | None) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)
