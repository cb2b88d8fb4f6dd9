"""Weights by broadcast: every sender has a process group with every rank of every server.

Rank 0 tells the servers bucket by bucket which sender's comes next, the same order to all of them, when that sender has it;
then it is broadcast. So while one bucket is on its way and is loaded, the next ones are put together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from megatron_dppo.errors import WeightSyncError
from megatron_dppo.models.hf.dtype_names import dtype_name
from megatron_dppo.models.hf.export import Bucket
from megatron_dppo.rollout.engine import WeightSource
from megatron_dppo.rollout.sglang.checksums import ExpectedChecksums, hash_tensors
from megatron_dppo.rollout.sglang.parameter_layout import ModelShape
from megatron_dppo.rollout.sglang.server_facts import ServerFacts
from megatron_dppo.rollout.sglang.update_calls import UpdateCalls
from megatron_dppo.rollout.sglang.update_group import join_update_group
from megatron_dppo.rollout.sglang.update_meeting import Meeting
from megatron_dppo.rollout.sglang.update_watch import ServersFailed, UpdateWatch, in_background
from megatron_dppo.rollout.sglang.weight_route import flatten, num_bytes

_LOOK_FOR_BUCKET_S = 0.001
_MOST_SENDERS_BEFORE = 16  # of a trainer that was killed


class BroadcastRoute:
    """A ``WeightRoute`` to servers on devices of their own."""

    def __init__(
        self,
        servers: Sequence[ServerFacts],
        dtype: torch.dtype,
        shape: ModelShape | None,
        *,
        calls: UpdateCalls,
        watch: UpdateWatch,
        on_gpu: bool,
        timeout_s: float,
    ) -> None:
        """``timeout_s``: of the groups, in which nothing takes longer than an update."""
        self._servers = list(servers)
        self._dtype = dtype
        self._shape = shape
        self._calls = calls
        self._watch = watch
        self._backend = "nccl" if on_gpu else "gloo"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self._timeout = timedelta(seconds=timeout_s)
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._meeting: Meeting | None = None
        self._senders: list[int] = []  # that have groups, or are about to
        self._connected = False
        self._loading: asyncio.Future[None] | None = None  # the last bucket
        self._group: dist.ProcessGroup | None = None  # of this rank with the servers
        self._kept: tuple[torch.Tensor, ...] = ()  # see _two_buffers

    def ranks(self, buckets: Sequence[Bucket]) -> frozenset[int]:
        """See ``WeightRoute``: who puts buckets together."""
        return frozenset(member for bucket in buckets for member in bucket.members) | {0}

    def is_open_for(self, buckets: Sequence[Bucket]) -> bool:
        """See ``WeightRoute``."""
        return self._senders == _senders(buckets)

    def meet(self, meeting: Meeting | None, buckets: Sequence[Bucket]) -> None:
        """See ``WeightRoute``."""
        self._meeting = meeting
        self._senders = _senders(buckets)

    async def connect(self) -> None:
        """See ``WeightRoute``: every group that is not there yet is made."""
        if not self._connected:
            # A trainer that was killed has left its groups there, and they take memory of every GPU.
            await self._destroy(map(self._group_name, range(_MOST_SENDERS_BEFORE)))
            for index in range(len(self._senders)):
                await self._join_all(self._group_name(index))
            self._connected = True

    async def _join_all(self, group_name: str) -> None:
        """All members of a group must come at the same time, so no server is told of the next before this one is made."""
        assert self._meeting is not None
        rank_offset, asked = 1, []
        for server in self._servers:
            body = {
                "master_address": self._meeting.place.address,
                "master_port": self._meeting.place.port,
                "rank_offset": rank_offset,
                "world_size": self._world_size(),
                "group_name": group_name,
                "backend": self._backend,
            }
            asked.append(self._calls.post(server.url, "/init_weights_update_group", body))
            rank_offset += server.num_ranks
        await asyncio.gather(*asked)

    def _world_size(self) -> int:
        """Of the group of one sender."""
        return 1 + sum(server.num_ranks for server in self._servers)

    def _group_name(self, index: int) -> str:
        """Of a sender, by its place among them."""
        assert self._meeting is not None
        return f"megatron_dppo_{self._meeting.place.number}_{index}"

    async def _destroy(self, group_names: Iterable[str]) -> None:
        posted = (
            self._calls.post(server.url, "/destroy_weights_update_group", {"group_name": name})
            for name in group_names
            for server in self._servers
        )
        await asyncio.gather(*posted, return_exceptions=True)  # a server that is gone has left already

    async def load(self, index: int, bucket: Bucket) -> None:
        """See ``WeightRoute``."""
        assert self._meeting is not None
        while not self._meeting.is_offered(index):
            await asyncio.sleep(_LOOK_FOR_BUCKET_S)
        if not self._meeting.take(index):
            raise WeightSyncError(f"rank {bucket.sender} has given up sending")
        # One bucket at a time: servers that took those of two senders in different orders would wait for each other.
        body = {
            "names": [name for name, _ in bucket.tensors],
            "dtypes": [dtype_name(self._dtype)] * len(bucket.tensors),
            "shapes": [list(shape) for _, shape in bucket.tensors],
            "group_name": self._group_name(self._senders.index(bucket.sender)),
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        bodies = {server.url: body for server in self._servers}
        # Servers are told of what was taken even if the update is given up meanwhile: its sender broadcasts it in any case,
        # and a group is left in order only when nothing is under way in it.
        path = "/update_weights_from_distributed"
        self._loading = asyncio.ensure_future(self._calls.load(bucket, path, bodies, self._shape))
        await asyncio.shield(self._loading)

    def send(self, weights: WeightSource, buckets: Sequence[Bucket], kinds: Sequence[ExpectedChecksums]) -> None:
        """See ``WeightRoute``."""
        fetched = weights.fetch(buckets, dtype=self._dtype, wait=self._watch.wait_for_ranks)
        try:
            if self._rank in self._senders and self._group is None:
                self._join()
            self._send(fetched, buckets, kinds)
        except ServersFailed:
            for _ in fetched:  # others have sent it, or will
                pass
            raise

    def _join(self) -> None:
        assert self._meeting is not None
        # A connection of its own: who waits by it keeps all others from it.
        name, store = self._group_name(self._senders.index(self._rank)), self._meeting.store.clone()  # type: ignore[attr-defined]
        joined = in_background(lambda: join_update_group(name, store, self._world_size(), self._backend, self._timeout))
        self._watch.until(joined.done)
        self._group = joined.result()

    def _send(
        self,
        fetched: Iterator[tuple[int, list[torch.Tensor]]],
        buckets: Sequence[Bucket],
        kinds: Sequence[ExpectedChecksums],
    ) -> None:
        if not any(self._rank in bucket.members for bucket in buckets):
            return
        assert self._meeting is not None
        on_its_way: dist.Work | None = None
        # One is filled while the other is on its way.
        size = max((num_bytes(b, self._dtype) for b in buckets if b.sender == self._rank), default=0)
        free, in_use = self._two_buffers(size)
        for index, tensors in fetched:
            flat = flatten(tensors, free)
            free, in_use = in_use, free
            self._meeting.offer(index)
            try:
                if on_its_way is not None:
                    self._watch.wait(on_its_way)
                self._watch.until(partial(self._meeting.is_wanted, index))
            except Exception:  # also a server's refusal, of which rank 0 hears first
                if not self._meeting.withdraw(index):  # servers were told meanwhile, and wait for the bytes
                    dist.broadcast(flat, group_src=0, group=self._group, async_op=True)
                raise
            on_its_way = dist.broadcast(flat, group_src=0, group=self._group, async_op=True)
            names = [name for name, _ in buckets[index].tensors]
            # What was put together is hashed, not what was made of it to be sent.
            hash_tensors(kinds, zip(names, tensors, strict=True))
            del tensors  # before the next bucket's are put together
        if on_its_way is not None:
            self._watch.wait(on_its_way)

    def _two_buffers(self, num_bytes: int) -> tuple[torch.Tensor, ...]:
        """Memory for two buckets. In a host's it is kept for the next update: new pages cost more than filling them.

        On a GPU torch keeps freed memory for whoever wants it next, and between updates that is training.
        """
        if self._kept and len(self._kept[0]) >= num_bytes:
            return self._kept
        buffers = tuple(torch.empty(num_bytes, dtype=torch.uint8, device=self._device) for _ in range(2))
        self._kept = buffers if self._device.type == "cpu" else ()
        return buffers

    async def leave(self) -> None:
        """See ``WeightRoute``."""
        if self._loading is not None:
            await asyncio.wait([self._loading], timeout=self._watch.time_left())
        await self._destroy(map(self._group_name, range(len(self._senders))))

    def close(self) -> None:
        """See ``WeightRoute``."""
        self._senders, self._connected = [], False
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        self._meeting = None
        self._kept = ()


def _senders(buckets: Sequence[Bucket]) -> list[int]:
    return sorted({bucket.sender for bucket in buckets})
