"""What a piece of a program does, seen operator by operator: bytes that it holds, operations, bytes that it moves, messages.

The tensors may have no values (meta). Storage is counted when an operator first returns it and until it is freed, as an
allocator without overhead would count it.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dppo.launch.plan.hardware import Assumptions, Gpu

_MATMULS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
_ATTENTION_PRODUCTS = {  # products of [queries, keys, dim] in it
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}
# Operators that only look at memory in another way, or set it aside.
_FREE = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "slice",
    "select",
    "expand",
    "unsqueeze",
    "squeeze",
    "detach",
}
_FREE |= {
    "alias",
    "as_strided",
    "split",
    "split_with_sizes",
    "unbind",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
}


class Operator(NamedTuple):
    """Something that is done once or more. ``kind``: matmul | attention | other."""

    kind: str
    flops: float
    moved: int


class Message(NamedTuple):
    """A collective, as one rank has a part in it: bytes that it sends within its node, and to others."""

    on_node: float
    away: float


@dataclass
class Work:
    """Counts of what was done."""

    operators: Counter[Operator] = field(default_factory=Counter)
    messages: Counter[Message] = field(default_factory=Counter)

    def flops(self, kind: str) -> float:
        """Operations of one kind."""
        return sum(operator.flops * count for operator, count in self.operators.items() if operator.kind == kind)

    def times(self, gpu: Gpu, assume: Assumptions) -> Times:
        """As a roofline: each operator takes as long as its operations or its bytes, whatever is longer."""
        shares = {"matmul": assume.matmul_share, "attention": assume.attention_share, "other": assume.hbm_share}
        seconds = dict.fromkeys(shares, 0.0)
        for operator, count in self.operators.items():
            computing = operator.flops / (gpu.peak * shares[operator.kind])
            moving = operator.moved / (gpu.hbm * assume.hbm_share)
            seconds[operator.kind] += count * max(computing, moving)
        sending = sum(count * message_time(message, gpu, assume) for message, count in self.messages.items())
        return Times(seconds["matmul"], seconds["attention"], seconds["other"], sending)


class Times(NamedTuple):
    """Seconds, one after the other."""

    matmul: float
    attention: float
    other: float
    messages: float


def message_time(message: Message, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds of a collective that nothing overlaps."""
    return assume.latency + max(message.on_node / gpu.nvlink, message.away / assume.network) / assume.link_share


def message(sent: float, ranks: Sequence[int], gpus_per_node: int, rank: int) -> Message:
    """``sent`` bytes, to each of the other ranks the same."""
    others = len(ranks) - 1
    near = sum(other // gpus_per_node == rank // gpus_per_node for other in ranks) - 1
    return Message(sent * near / others, sent * (others - near) / others) if others else Message(0.0, 0.0)


class Trace(TorchDispatchMode):
    """Within: everything that runs is counted.

    Attributes:
        live: bytes that are held now.
        peak: most bytes that were held at any time.
        work: what was done; may be exchanged for another at any time.
    """

    def __init__(self, gpus_per_node: int, existing: Iterable[torch.Tensor] = ()) -> None:
        """``existing``: tensors that are there already and count for nothing."""
        super().__init__()
        self.live = 0
        self.peak = 0
        self.work = Work()
        self._gpus_per_node = gpus_per_node
        self._known: set[int] = set()
        self._kept_alive = [tensor.untyped_storage() for tensor in existing]
        self._known.update(storage._cdata for storage in self._kept_alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it and count."""
        result = func(*args, **(kwargs or {}))
        results = [x for x in _flat(result) if isinstance(x, torch.Tensor)]
        inputs = [x for x in _flat([args, kwargs]) if isinstance(x, torch.Tensor)]
        if func.namespace == "c10d":
            self._count_message(func, args, inputs)
        elif (name := func._schema.name.split("::")[1]) not in _FREE:
            kind, flops = _operations(name, inputs, args)
            self.work.operators[Operator(kind, flops, sum(map(_nbytes, [*inputs, *results])))] += 1
        for tensor in results:
            self._hold(tensor)
        return result

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes

    def _count_message(self, func: Any, args: Any, inputs: list[torch.Tensor]) -> None:
        group = next((_unboxed(x) for x in args if isinstance(x, torch.ScriptObject) and _unboxed(x) is not None), None)
        if group is None or group.size() == 1 or inputs[0].device.type != "meta":
            return
        whole = max(map(_nbytes, inputs)) * (1 - 1 / group.size())
        rounds = 2 if "allreduce" in func._schema.name else 1
        ranks = dist.get_process_group_ranks(group)
        self.work.messages[message(rounds * whole, ranks, self._gpus_per_node, dist.get_rank())] += 1


def _unboxed(thing: Any) -> dist.ProcessGroup | None:
    try:
        return dist.ProcessGroup.unbox(thing)
    except (RuntimeError, TypeError):
        return None


def _operations(name: str, inputs: list[torch.Tensor], args: Any) -> tuple[str, float]:
    """What kind of operator it is, and its multiplications and additions as far as it is made of products."""
    if name in _MATMULS:
        first, second = [x for x in _flat(args) if isinstance(x, torch.Tensor)][-2:]
        return "matmul", 2.0 * math.prod(first.shape) * second.shape[-1]
    if (products := _ATTENTION_PRODUCTS.get(name)) is not None:
        query, key = [x for x in inputs if x.dim() == 4][(0 if products == 2 else 1) :][:2]
        batch, heads, queries, dim = query.shape
        keys = key.shape[2]
        pairs = queries * (keys - queries) + queries * (queries + 1) / 2  # causal
        return "attention", 2.0 * products * batch * heads * dim * pairs
    return "other", 0.0


def _flat(thing: Any) -> Iterable[Any]:
    if isinstance(thing, list | tuple):
        for item in thing:
            yield from _flat(item)
    elif isinstance(thing, dict):
        yield from _flat(list(thing.values()))
    else:
        yield thing


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
