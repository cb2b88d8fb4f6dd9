"""Sends a full set of weights to every server and proves that they serve it.

    pause -> flush the KV cache -> begin -> buckets (HTTP names, broadcast bytes) -> end -> verify -> label -> continue

Some ranks of the trainer send. Each has a process group with every rank of every server. Rank 0 tells the servers bucket by
bucket which sender's comes next, the same order to all of them, when that sender has it; then it is broadcast. So while one
bucket is on its way and is loaded, the next ones are put together.

SGLang reports success for a tensor whose name it does not know, so nothing it says is believed: the checksums of all its
parameters are compared with those of what was sent before generation continues.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_dppo.distributed.collectives import first_error, gather_objects, on_one_rank
from megatron_dppo.distributed.point_to_point import Parcel, deliver
from megatron_dppo.errors import RefusedRequestError, RolloutError, WeightSyncError
from megatron_dppo.models.hf.dtype_names import dtype_name
from megatron_dppo.models.hf.export import Bucket, NamedShape
from megatron_dppo.rollout.engine import WeightSource
from megatron_dppo.rollout.sglang.answers import reading
from megatron_dppo.rollout.sglang.checksums import ExpectedChecksums, hash_tensors
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.parameter_layout import ModelShape, ServerLayout, placement
from megatron_dppo.rollout.sglang.server_facts import ServerFacts
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.sglang.update_group import address_seen_from, join_update_group, open_store

T = TypeVar("T")

_POLL_S = 0.002
_LOOK_FOR_BUCKET_S = 0.001
_LOOK_FOR_FAILURES_S = 0.2
_TAKEN, _WITHDRAWN = "taken", "withdrawn"
_FAILURE = "failure"  # key in the store of an update: what the first rank that failed says


class WeightSync:
    """The way to a fixed set of servers. Made, and used, by all ranks of the trainer together."""

    def __init__(
        self,
        servers: Sequence[ServerFacts],
        config: SGLangConfig,
        shape: ModelShape | None,
        dtype: torch.dtype,
        transport: Transport,
    ) -> None:
        """``shape`` is None if updates are not verified. ``transport`` is used by rank 0 alone."""
        devices = {server.layout.device_type for server in servers}
        if len(devices) != 1:
            raise RolloutError(f"servers on different kinds of device cannot be updated together: {list(servers)}")
        self._servers = list(servers)
        self._config = config
        self._shape = shape
        self._dtype = dtype
        self._transport = transport
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._is_owner = self._rank == 0
        self._backend = "nccl" if devices == {"cuda"} else "gloo"
        self._device = torch.device("cuda", torch.cuda.current_device()) if self._backend == "nccl" else "cpu"
        self._senders: list[int] = []  # that have groups
        self._group: dist.ProcessGroup | None = None  # of this rank with the servers
        self._store: TCPStore | None = None
        self._id = ""
        self._updates = 0
        self._laid_out: list[NamedShape] = []  # for which the expectations are
        self._expectations: dict[ServerLayout, ExpectedChecksums] = {}
        self._deadline = 0.0
        self._driver: Future[None] | None = None

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
        self._deadline = time.monotonic() + self._config.sync_timeout_s
        self._updates += 1
        try:
            buckets = self._attempted(
                lambda: list(
                    weights.buckets(
                        dtype=self._dtype,
                        bucket_bytes=self._config.bucket_bytes,
                        max_senders=self._config.max_senders,
                    )
                )
            )
            expected = self._attempted(lambda: self._expected(buckets))
            self._meet(buckets)
            self._attempted(lambda: self._send(weights, buckets, list(expected.values())))
            if self._shape is not None:
                for layout in dict.fromkeys(server.layout for server in self._servers):
                    _add_up(expected.get(layout), sorted({bucket.sender for bucket in buckets}))
            on_one_rank(lambda: self._conclude(expected, version))
        except WeightSyncError:
            raise
        except Exception as error:
            raise WeightSyncError(f"weight update to version {version} failed: {error}") from error

    def _attempted(self, action: Callable[[], T]) -> T:
        """Its result; where it fails on one rank, the error on all of them."""
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        failure = first_error(error)
        if failure is not None:
            raise failure from error
        return result

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
        senders = sorted({bucket.sender for bucket in buckets})
        if self._senders == senders:
            return
        self.close()
        address, port, self._id = on_one_rank(self._open_store)
        if not self._is_owner and any(self._rank in bucket.members for bucket in buckets):
            self._store = TCPStore(address, port, is_master=False, timeout=self._timeout())

    def _open_store(self) -> tuple[str, int, str]:
        address = self._config.master_address or address_seen_from(self._servers[0].url)
        self._store = open_store(address, self._timeout())
        return address, self._store.port, uuid.uuid4().hex

    def _world_size(self) -> int:
        """Of the group of one sender."""
        return 1 + sum(server.num_ranks for server in self._servers)

    def _timeout(self) -> timedelta:
        return timedelta(seconds=self._config.sync_timeout_s)

    def _send(self, weights: WeightSource, buckets: Sequence[Bucket], kinds: Sequence[ExpectedChecksums]) -> None:
        """This rank's part of the sending; on rank 0 until the servers have everything."""
        senders = sorted({bucket.sender for bucket in buckets})
        joining = self._senders != senders
        if self._is_owner:
            self._driver = self._transport.submit(self._drive(buckets, senders if joining else []))
        try:
            if joining and self._rank in senders:
                assert self._store is not None
                # A connection of its own: who waits by it keeps all others from it.
                name, store = self._group_name(self._rank), self._store.clone()  # type: ignore[attr-defined]
                joined = in_background(
                    lambda: join_update_group(name, store, self._world_size(), self._backend, self._timeout())
                )
                self._until(joined.done)
                self._group = joined.result()
            self._senders = senders
            if any(self._rank in bucket.members for bucket in buckets):
                self._send_mine(weights, buckets, kinds)
            if self._driver is not None:
                self._until(self._driver.done)
                self._driver.result()
        except Exception as error:
            self._tell_others(error)
            raise
        finally:
            if self._driver is not None:
                self._driver.cancel()
                self._driver = None

    def _send_mine(self, weights: WeightSource, buckets: Sequence[Bucket], kinds: Sequence[ExpectedChecksums]) -> None:
        on_its_way: dist.Work | None = None
        # One is filled while the other is on its way. Memory that is new for every bucket costs a CPU more than filling it.
        size = max((_num_bytes(b, self._dtype) for b in buckets if b.sender == self._rank), default=0)
        free, in_use = (torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2))
        for index, tensors in weights.fetch(buckets, dtype=self._dtype, wait=self._wait):
            flat = flatten(tensors, free)
            free, in_use = in_use, free
            self._offer(index)
            try:
                if on_its_way is not None:
                    self._wait(on_its_way)
                self._until(partial(self._is_wanted, index))
            except Exception:  # also a server's refusal, of which rank 0 hears first
                if not self._withdraw(index):  # servers were told meanwhile, and wait for the bytes
                    dist.broadcast(flat, group_src=0, group=self._group, async_op=True)
                raise
            on_its_way = dist.broadcast(flat, group_src=0, group=self._group, async_op=True)
            names = [name for name, _ in buckets[index].tensors]
            # What was put together is hashed, not what was made of it to be sent.
            hash_tensors(kinds, zip(names, tensors, strict=True))
        if on_its_way is not None:
            self._wait(on_its_way)

    # A server that is told of a bucket waits for its bytes, whatever becomes of their sender. So a bucket is offered by its
    # sender first, and then either rank 0 takes it or the sender withdraws it: whoever is first in the store.

    def _offer(self, index: int) -> None:
        assert self._store is not None
        self._store.set(f"{self._updates}/offered/{index}", "")

    def _is_offered(self, index: int) -> bool:
        assert self._store is not None
        key = f"{self._updates}/offered/{index}"
        return bool(self._store.check([key]) and self._store.delete_key(key))

    def _take(self, index: int) -> bool:
        """Whether the servers can be told."""
        return self._settle(index, _TAKEN)

    def _withdraw(self, index: int) -> bool:
        """Whether the servers will not be told."""
        return self._settle(index, _WITHDRAWN)

    def _settle(self, index: int, outcome: str) -> bool:
        assert self._store is not None
        return bool(self._store.compare_set(f"{self._updates}/settled/{index}", "", outcome) == outcome.encode())

    def _is_wanted(self, index: int) -> bool:
        """Asked by its sender until it is so."""
        assert self._store is not None
        key = f"{self._updates}/settled/{index}"
        return bool(self._store.check([key]) and self._store.delete_key(key))

    def _wait(self, work: dist.Work) -> None:
        """Wait for what other processes have a part in, unless one of them fails."""
        if self._backend == "nccl":
            self._until(work.is_completed)
            work.wait()
            return
        # Gloo's messages are not complete before they are waited for.
        waiting = in_background(work.wait)
        self._until(waiting.done)
        try:
            waiting.result()
        except RuntimeError as error:
            raise WeightSyncError(f"sending weights to {self.urls} failed: {error}") from error

    def _until(self, done: Callable[[], bool]) -> None:
        """Raise WeightSyncError if a server, or another rank, fails first, or if it takes too long."""
        look = time.monotonic()
        while not done():
            if self._driver is not None and self._driver.done():
                self._driver.result()
            if time.monotonic() > self._deadline:
                raise self._too_late()
            if time.monotonic() > look:
                look = time.monotonic() + _LOOK_FOR_FAILURES_S
                if self._store is not None and self._store.check([_FAILURE]):
                    raise WeightSyncError(self._store.get(_FAILURE).decode())
            time.sleep(_POLL_S)

    def _tell_others(self, error: Exception) -> None:
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # whose store it is may be gone
                self._store.compare_set(_FAILURE, "", f"{error}")

    async def _drive(self, buckets: Sequence[Bucket], joining: Sequence[int]) -> None:
        """What the servers are told, from the pause to the end of the update."""
        for sender in joining:
            await self._join_all(sender)
        await self._post_all("/pause_generation", {"mode": "abort"})
        await self._post_all("/flush_cache", {})
        await asyncio.gather(*(self._begin(url) for url in self.urls))
        for index, bucket in enumerate(buckets):
            while not self._is_offered(index):
                await asyncio.sleep(_LOOK_FOR_BUCKET_S)
            if not self._take(index):
                raise WeightSyncError(f"rank {bucket.sender} has given up sending")
            # One bucket at a time: servers that took those of two senders in different orders would wait for each other.
            body = {
                "names": [name for name, _ in bucket.tensors],
                "dtypes": [dtype_name(self._dtype)] * len(bucket.tensors),
                "shapes": [list(shape) for _, shape in bucket.tensors],
                "group_name": self._group_name(bucket.sender),
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            try:
                await self._post_all("/update_weights_from_distributed", body)
            except RefusedRequestError as error:
                raise WeightSyncError(f"{error}; concerns {self._tensors_meant(str(error), bucket)}") from error
        await self._post_all("/end_weight_update", {})

    async def _join_all(self, sender: int) -> None:
        """All members of a group must come at the same time, so no server is told of the next before this one is made."""
        assert self._store is not None
        rank_offset, asked = 1, []
        for server in self._servers:
            body = {
                "master_address": self._store.host,
                "master_port": self._store.port,
                "rank_offset": rank_offset,
                "world_size": self._world_size(),
                "group_name": self._group_name(sender),
                "backend": self._backend,
            }
            asked.append(self._post(server.url, "/init_weights_update_group", body))
            rank_offset += server.num_ranks
        await asyncio.gather(*asked)

    async def _begin(self, url: str) -> None:
        """Open the update; one that a trainer left open when it died is closed first."""
        try:
            await self._post(url, "/begin_weight_update", {})
        except RefusedRequestError:
            await self._post(url, "/end_weight_update", {})
            await self._post(url, "/begin_weight_update", {})

    def _tensors_meant(self, refusal: str, bucket: Bucket) -> str:
        """The tensors of a bucket that a server speaks of: it names its own parameters, not the checkpoint's tensors."""
        names = [name for name, _ in bucket.tensors]
        if self._shape is not None:
            places = {name: placement(name, self._shape) for name in names}
            names = [name for name, place in places.items() if place and place.parameter in refusal] or names
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    def _conclude(self, expected: dict[ServerLayout, ExpectedChecksums], version: int) -> None:
        async def concluded() -> None:
            await asyncio.gather(
                *(self._verify(server, expected[server.layout]) for server in self._servers if expected)
            )
            label = {"new_version": str(version), "abort_all_requests": False}
            await self._post_all("/update_weight_version", label)
            await self._post_all("/continue_generation", {})

        self._transport.submit(concluded()).result()

    async def _verify(self, server: ServerFacts, expected: ExpectedChecksums) -> None:
        answer = await self._post(server.url, "/weights_checker", {"action": "checksum"})
        with reading(f"{server.url}/weights_checker"):
            checksums = [
                (int(rank["parallelism_info"][0]["tp_rank"]), dict(rank["checksums"])) for rank in answer["ranks"]
            ]
        faults = expected.compare(checksums)
        if faults:
            listed = "\n  ".join(faults[:10])
            raise WeightSyncError(
                f"{server.url} does not serve the weights that it was sent; wrong parameters: {len(faults)}\n  {listed}"
            )

    async def _post(self, url: str, path: str, body: dict[str, Any]) -> Any:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._too_late()
        return await self._transport.request(url, path, body, left)

    async def _post_all(self, path: str, body: dict[str, Any]) -> None:
        await asyncio.gather(*(self._post(url, path, body) for url in self.urls))

    def _too_late(self) -> WeightSyncError:
        limit = self._config.sync_timeout_s
        return WeightSyncError(f"the weight update of {self.urls} took longer than sync_timeout_s = {limit:g} s")

    def _group_name(self, sender: int) -> str:
        return f"megatron_dppo_{self._id}_{sender}"

    def close(self) -> None:
        """Leave the process groups, here and on the servers that still answer. Safe to call twice."""
        senders, self._senders = self._senders, []
        if self._is_owner and senders:

            async def left() -> None:
                posted = (
                    self._post(url, "/destroy_weights_update_group", {"group_name": self._group_name(sender)})
                    for sender in senders
                    for url in self.urls
                )
                await asyncio.gather(*posted, return_exceptions=True)  # a server that is gone has left already

            self._deadline = time.monotonic() + self._config.control_timeout_s
            self._transport.submit(left()).result()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        self._store = None


def flatten(tensors: Sequence[torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
    """The bytes of the tensors one after the other, in ``buffer``: what a server's ``flattened_bucket`` expects."""
    sizes = [tensor.nbytes for tensor in tensors]
    flat = buffer[: sum(sizes)]
    for part, tensor in zip(flat.split(sizes), tensors, strict=True):
        part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return flat


def _num_bytes(bucket: Bucket, dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(math.prod(shape) for _, shape in bucket.tensors)


def in_background(action: Callable[[], T]) -> Future[T]:
    """Run it in a thread that ends with the process: what waits for others may never return."""
    future: Future[T] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="weight-sync", daemon=True).start()
    return future


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
