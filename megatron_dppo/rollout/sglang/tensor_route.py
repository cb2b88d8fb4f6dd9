"""Weights to servers on the trainer's own devices: each rank of a server reads them from its trainer rank's memory.

    sender: whole tensors -> one broadcast a bucket among the trainer's ranks -> a copy on every device
    rank 0: hands the servers, for each of their ranks, the handle of the copy on its device

Two processes on one device cannot be in one NCCL group, and a handle is good on its own device only. A bucket's memory is
used again, or given back, when every server has said that it has loaded it: a server answers when it has let go of the
handle, before which it waits for its copies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from megatron_dppo.models.hf.export import Bucket
from megatron_dppo.rollout.engine import WeightSource
from megatron_dppo.rollout.sglang.checksums import ExpectedChecksums, hash_tensors
from megatron_dppo.rollout.sglang.parameter_layout import ModelShape
from megatron_dppo.rollout.sglang.server_facts import ServerFacts
from megatron_dppo.rollout.sglang.tensor_payload import handle_of, payload
from megatron_dppo.rollout.sglang.update_calls import UpdateCalls
from megatron_dppo.rollout.sglang.update_meeting import Meeting
from megatron_dppo.rollout.sglang.update_watch import UpdateWatch
from megatron_dppo.rollout.sglang.weight_route import flatten, num_bytes

_LOOK_FOR_HANDLES_S = 0.001
_BUFFERS = 2  # one is filled while the servers load the other


class TensorRoute:
    """A ``WeightRoute`` to servers that this host's trainer ranks share their devices with."""

    def __init__(
        self,
        servers: Sequence[ServerFacts],
        dtype: torch.dtype,
        shape: ModelShape | None,
        *,
        calls: UpdateCalls,
        watch: UpdateWatch,
        on_gpu: bool,
    ) -> None:
        """``servers``: all that share the devices, in the order of these."""
        self._servers = list(servers)
        self._dtype = dtype
        self._shape = shape
        self._calls = calls
        self._watch = watch
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._slots = sum(server.num_ranks for server in self._servers)  # a number for each rank of each server
        self._meeting: Meeting | None = None

    def ranks(self, buckets: Sequence[Bucket]) -> frozenset[int]:
        """See ``WeightRoute``: all, as each has a device."""
        return frozenset(range(self._world_size))

    def is_open_for(self, buckets: Sequence[Bucket]) -> bool:
        """See ``WeightRoute``."""
        return self._meeting is not None

    def meet(self, meeting: Meeting | None, buckets: Sequence[Bucket]) -> None:
        """See ``WeightRoute``."""
        self._meeting = meeting

    async def connect(self) -> None:
        """See ``WeightRoute``: nothing is needed."""

    async def load(self, index: int, bucket: Bucket) -> None:
        """See ``WeightRoute``."""
        assert self._meeting is not None
        ranks = range(self._world_size)
        while not self._meeting.are_handed_in(index, ranks):
            await asyncio.sleep(_LOOK_FOR_HANDLES_S)
        of_ranks = [handles.split() for handles in self._meeting.collect(index, ranks)]
        handles = (of_ranks[slot % self._world_size][slot // self._world_size] for slot in range(self._slots))
        bodies = {
            server.url: {
                "serialized_named_tensors": [
                    payload(next(handles), bucket.tensors, self._dtype) for _ in range(server.num_ranks)
                ],
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            for server in self._servers
        }
        await self._calls.load(bucket, "/update_weights_from_tensor", bodies, self._shape)
        self._meeting.set_loaded(index + 1)

    def send(self, weights: WeightSource, buckets: Sequence[Bucket], kinds: Sequence[ExpectedChecksums]) -> None:
        """See ``WeightRoute``."""
        self._send(weights, buckets, kinds)
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # torch keeps what was shared until it is asked
            torch.cuda.empty_cache()

    def _send(self, weights: WeightSource, buckets: Sequence[Bucket], kinds: Sequence[ExpectedChecksums]) -> None:
        size = max(num_bytes(bucket, self._dtype) for bucket in buckets)
        buffers = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(_BUFFERS)]
        for index, bucket in enumerate(buckets):
            # The one place where servers' failures count: all ranks come to it with the same buckets behind them.
            self._watch.until(partial(self._is_loaded, index - _BUFFERS))
            flat = buffers[index % _BUFFERS][: num_bytes(bucket, self._dtype)]
            self._fill(index, bucket, flat, weights, kinds)
            self._hand_in(index, flat)
        self._watch.until(partial(self._is_loaded, len(buckets) - 1))

    def _is_loaded(self, index: int) -> bool:
        assert self._meeting is not None
        return index < 0 or self._meeting.loaded() > index

    def _fill(
        self,
        index: int,
        bucket: Bucket,
        flat: torch.Tensor,
        weights: WeightSource,
        kinds: Sequence[ExpectedChecksums],
    ) -> None:
        """Bring a bucket to this device. All ranks take the buckets in one order: none waits for one that waits for it."""
        assert self._meeting is not None
        if self._rank in bucket.members:
            for _, tensors in weights.fetch([bucket], dtype=self._dtype, wait=self._watch.wait_for_ranks):
                flatten(tensors, flat)
                self._meeting.offer(index)
                on_its_way = self._spread(flat, bucket)
                names = [name for name, _ in bucket.tensors]
                # What was put together is hashed, not what was made of it to be sent.
                hash_tensors(kinds, zip(names, tensors, strict=True))
        if self._rank != bucket.sender:
            # Nobody begins to wait for a bucket that its sender may not come to have.
            self._watch.until_ranks(partial(self._meeting.is_offered, index))
            on_its_way = self._spread(flat, bucket)
        if on_its_way is not None:
            self._watch.wait_for_ranks(on_its_way)

    def _spread(self, flat: torch.Tensor, bucket: Bucket) -> dist.Work | None:
        if self._world_size == 1:
            return None
        return dist.broadcast(flat, bucket.sender, async_op=True)

    def _hand_in(self, index: int, flat: torch.Tensor) -> None:
        """Say where the copy on this device is, once for each who uses it: on a GPU that is one rank of a server."""
        assert self._meeting is not None
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # who opens it does not wait for this process
        handles = [handle_of(flat) for _ in range(self._rank, self._slots, self._world_size)]
        self._meeting.hand_in(index, self._rank, " ".join(handles))

    async def leave(self) -> None:
        """See ``WeightRoute``: there is nothing to be forgotten."""

    def close(self) -> None:
        """See ``WeightRoute``."""
        self._meeting = None
