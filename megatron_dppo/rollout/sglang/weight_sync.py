"""Sends a full set of weights to every server and proves that they serve it.

    pause -> flush the KV cache -> begin -> buckets -> end -> verify -> label -> continue

Some ranks of the trainer send. How bytes travel is a route's: by broadcast to servers elsewhere (broadcast_route.py), by
handles to servers on the trainer's devices (tensor_route.py). The latter get the memory for weights back before the update
begins, and that for the KV cache when the weights are proven.

SGLang reports success for a tensor whose name it does not know, so nothing it says is believed: the checksums of all its
parameters are compared with those of what was sent before generation continues.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_dppo.distributed.collectives import attempted, gather_objects, on_one_rank
from megatron_dppo.distributed.point_to_point import Parcel, deliver
from megatron_dppo.errors import RolloutError, WeightSyncError
from megatron_dppo.models.hf.export import Bucket, NamedShape
from megatron_dppo.rollout.engine import WeightSource
from megatron_dppo.rollout.sglang.broadcast_route import BroadcastRoute
from megatron_dppo.rollout.sglang.checksums import ExpectedChecksums
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.mismatch import Mismatch, explained
from megatron_dppo.rollout.sglang.parameter_layout import ModelShape, ServerLayout
from megatron_dppo.rollout.sglang.part_hashes import parts_of, request_for
from megatron_dppo.rollout.sglang.server_facts import ServerFacts
from megatron_dppo.rollout.sglang.server_memory import WEIGHTS, ServerMemory
from megatron_dppo.rollout.sglang.tensor_route import TensorRoute
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.sglang.update_calls import UpdateCalls
from megatron_dppo.rollout.sglang.update_group import address_seen_from
from megatron_dppo.rollout.sglang.update_meeting import Meeting, MeetingPlace
from megatron_dppo.rollout.sglang.update_watch import ServersFailed, UpdateWatch
from megatron_dppo.rollout.sglang.weight_route import WeightRoute


class WeightSync:
    """The way to a fixed set of servers. Made, and used, by all ranks of the trainer together."""

    def __init__(
        self,
        servers: Sequence[ServerFacts],
        config: SGLangConfig,
        shape: ModelShape | None,
        dtype: torch.dtype,
        transport: Transport,
        memory: ServerMemory | None = None,
    ) -> None:
        """``shape`` is None if updates are not verified. ``transport`` and ``memory`` are used by rank 0 alone.

        ``memory``: of servers that share the trainer's devices (``config.colocated``).
        """
        devices = {server.layout.device_type for server in servers}
        if len(devices) != 1:
            raise RolloutError(f"servers on different kinds of device cannot be updated together: {list(servers)}")
        self._servers = list(servers)
        self._config = config
        self._shape = shape
        self._dtype = dtype
        self._transport = transport
        self._memory = memory
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._is_owner = self._rank == 0
        on_gpu = devices == {"cuda"}
        self._watch = UpdateWatch(self.urls, on_gpu)
        self._calls = UpdateCalls(self.urls, transport, self._watch.time_left)
        self._route = self._make_route(on_gpu)
        self._meeting: Meeting | None = None
        self._laid_out: list[NamedShape] = []  # for which the expectations are
        self._expectations: dict[ServerLayout, ExpectedChecksums] = {}

    def _make_route(self, on_gpu: bool) -> WeightRoute:
        given = (self._servers, self._dtype, self._shape)
        if self._config.colocated:
            return TensorRoute(*given, calls=self._calls, watch=self._watch, on_gpu=on_gpu)
        timeout_s = self._config.sync_timeout_s
        return BroadcastRoute(*given, calls=self._calls, watch=self._watch, on_gpu=on_gpu, timeout_s=timeout_s)

    @property
    def servers(self) -> list[ServerFacts]:
        """Those that are updated."""
        return list(self._servers)

    @property
    def urls(self) -> list[str]:
        """Their addresses."""
        return [server.url for server in self._servers]

    def update(self, weights: WeightSource, version: int) -> None:
        """Send all weights, verify them, and let generation continue as ``version``. Collective.

        Raises WeightSyncError, on all ranks alike, if anything at all went wrong. Then the servers stay paused, so that no
        response is ever drawn by a mixture of old and new weights.
        """
        self._watch.start(self._config.sync_timeout_s)
        try:
            buckets = attempted(
                lambda: list(
                    weights.buckets(
                        dtype=self._dtype,
                        bucket_bytes=self._config.bucket_bytes,
                        max_senders=self._config.max_senders,
                    )
                )
            )
            expected = attempted(lambda: self._expected(buckets))
            self._meet(buckets)
            attempted(lambda: self._send(weights, buckets, list(expected.values())))
            if self._shape is not None:
                for layout in dict.fromkeys(server.layout for server in self._servers):
                    _add_up(expected.get(layout), sorted({bucket.sender for bucket in buckets}))
            mismatch = on_one_rank(lambda: self._conclude(expected, version))
            if mismatch is not None:
                raise explained(mismatch, expected.get(mismatch.layout), weights, buckets, self._dtype, self._watch)
        except WeightSyncError:
            raise
        except Exception as error:
            raise WeightSyncError(f"weight update to version {version} failed: {error}") from error

    def _expected(self, buckets: Sequence[Bucket]) -> dict[ServerLayout, ExpectedChecksums]:
        """What each kind of server has to hold afterwards; nothing if that is not asked, or not for this rank to say."""
        if self._shape is None or not (self._is_owner or any(self._rank == bucket.sender for bucket in buckets)):
            return {}
        tensors = [tensor for bucket in buckets for tensor in bucket.tensors]
        if tensors != self._laid_out:
            layouts = dict.fromkeys(server.layout for server in self._servers)
            self._expectations = {
                layout: ExpectedChecksums(tensors, self._shape, layout, self._dtype) for layout in layouts
            }
            self._laid_out = tensors
        return {layout: expected.emptied() for layout, expected in self._expectations.items()}

    def _meet(self, buckets: Sequence[Bucket]) -> None:
        """Open a store where senders and servers find each other, and where a rank that fails tells the others."""
        if not self._route.is_open_for(buckets):
            self.close()
            place = on_one_rank(self._open_meeting)
            if not self._is_owner and self._rank in self._route.ranks(buckets):
                self._meeting = Meeting.joined(place, self._timeout())
            self._watch.meeting = self._meeting
            self._route.meet(self._meeting, buckets)
        if self._meeting is not None:
            self._meeting.begin_update()

    def _open_meeting(self) -> MeetingPlace:
        address = self._config.master_address or address_seen_from(self._servers[0].url)
        self._meeting = Meeting.opened(address, self._timeout())
        return self._meeting.place

    def _timeout(self) -> timedelta:
        return timedelta(seconds=self._config.sync_timeout_s)

    def _send(self, weights: WeightSource, buckets: Sequence[Bucket], kinds: Sequence[ExpectedChecksums]) -> None:
        """This rank's part of the sending; on rank 0 until the servers have everything."""
        if self._is_owner:
            self._watch.driver = self._transport.submit(self._drive_or_tell(buckets))
        try:
            self._route.send(weights, buckets, kinds)
            if self._watch.driver is not None:
                self._watch.until(self._watch.driver.done)
                self._watch.check_servers()
        except ServersFailed as failed:
            # Rank 0 has the error itself, and is the one that is believed.
            raise failed.__cause__ or WeightSyncError(f"{failed}") from None
        except Exception as error:
            if self._meeting is not None:
                self._meeting.tell_failure(error)
            raise
        finally:
            if self._watch.driver is not None:
                self._watch.driver.cancel()
                self._watch.driver = None

    async def _drive_or_tell(self, buckets: Sequence[Bucket]) -> None:
        try:
            await self._drive(buckets)
        except Exception as error:
            assert self._meeting is not None
            self._meeting.tell_failure(error, of_servers=True)
            raise

    async def _drive(self, buckets: Sequence[Bucket]) -> None:
        """What the servers are told, from the pause to the end of the update."""
        await self._route.connect()
        if self._memory is None:
            await self._calls.pause()
        else:  # which rest already, but for one that has just started
            left = self._watch.time_left
            await asyncio.gather(*(self._memory.rest(url, left) for url in self.urls))
            await self._take_back(self._memory, WEIGHTS)
        await self._calls.begin()
        for index, bucket in enumerate(buckets):
            await self._route.load(index, bucket)
        await self._calls.end()

    async def _take_back(self, memory: ServerMemory, *tags: frozenset[str]) -> None:
        await asyncio.gather(*(memory.take_back(url, self._watch.time_left, *tags) for url in self.urls))

    def _conclude(self, expected: dict[ServerLayout, ExpectedChecksums], version: int) -> Mismatch | None:
        return self._transport.submit(self._prove_and_go_on(expected, version)).result()

    async def _prove_and_go_on(self, expected: dict[ServerLayout, ExpectedChecksums], version: int) -> Mismatch | None:
        """What the first server that holds something wrongly holds; None, and they generate, if there is none."""
        if expected:
            found = await asyncio.gather(*(self._verify(server, expected[server.layout]) for server in self._servers))
            for mismatch in found:
                if mismatch is not None:
                    return mismatch
        await self._calls.label(version)
        if self._memory is not None:
            await self._take_back(self._memory)
        await self._calls.go_on()
        return None

    async def _verify(self, server: ServerFacts, expected: ExpectedChecksums) -> Mismatch | None:
        reported = await self._calls.checksums(server.url)
        faults = expected.faults(reported)
        if not faults:
            return None
        parts = parts_of(expected, expected.differing(reported))
        try:
            of_parts = await self._calls.checksums(server.url, request_for(parts)) if parts else []
        except RolloutError:  # what is wrong is known without
            of_parts = []
        return Mismatch(server.url, faults, server.layout, parts, of_parts)

    def close(self) -> None:
        """Leave the way to the servers, here and on those that still answer. Safe to call twice."""
        if self._is_owner and self._meeting is not None:
            self._watch.start(self._config.control_timeout_s)
            self._transport.submit(self._route.leave()).result()
            self._meeting.close()
        self._route.close()
        self._meeting = self._watch.meeting = None


def _add_up(kind: ExpectedChecksums | None, senders: Sequence[int]) -> None:
    """Give rank 0 what all senders have hashed. Collective; ``kind`` is None on ranks that are neither."""
    others = [sender for sender in senders if sender != 0]
    if not others:
        return
    rank = dist.get_rank()
    nothing = torch.empty(0, dtype=torch.uint8)
    mine = nothing if kind is None or rank == 0 else kind.to_tensor().view(torch.uint8)
    sizes = gather_objects(len(mine))
    parcels = [Parcel(sender, (0,), sizes[sender]) for sender in others]
    arrived = deliver(parcels, {i: mine for i, sender in enumerate(others) if sender == rank})
    if kind is not None and rank == 0:
        for content in arrived.values():
            kind.add_tensor(content.view(torch.int64))
