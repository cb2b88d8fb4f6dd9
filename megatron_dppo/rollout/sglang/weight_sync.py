"""Sends a full set of weights to every server and proves that they serve it.

    pause -> flush the KV cache -> begin -> buckets (HTTP names, broadcast bytes) -> end -> verify -> label -> continue

The bytes travel through a process group of their own, of which the trainer's rank 0 is rank 0 and every rank of every
server is one more. SGLang reports success for a tensor whose name it does not know, so nothing it says is believed: the
checksums of all its parameters are compared with those of the export before generation continues.
"""

from __future__ import annotations

import concurrent.futures
import socket
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore, distributed_c10d  # type: ignore[attr-defined]

from megatron_dppo.errors import RefusedRequestError, RolloutError, WeightSyncError
from megatron_dppo.models.hf.config import dtype_name
from megatron_dppo.rollout.engine import NamedTensors
from megatron_dppo.rollout.sglang.answers import reading
from megatron_dppo.rollout.sglang.checksums import ExpectedChecksums
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.parameter_layout import ModelShape, placement
from megatron_dppo.rollout.sglang.transport import Transport

_POLL_S = 0.002


@dataclass(frozen=True)
class ServerFacts:
    """What a weight update has to know about a server, as the server itself reports it."""

    url: str
    tp_size: int
    device_type: str

    @classmethod
    def ask(cls, transport: Transport, url: str, config: SGLangConfig) -> ServerFacts:
        """Read ``/server_info``. Raises RolloutError for a layout that cannot be updated by broadcast."""
        info = transport.call(url, "/server_info", None, config.control_timeout_s)
        with reading(f"{url}/server_info"):
            for size in ("pp_size", "dp_size", "ep_size"):
                if info.get(size, 1) != 1:
                    raise RolloutError(
                        f"{url} runs with {size} = {info[size]}: only servers with nothing but tensor parallelism can be"
                        " updated"
                    )
            return cls(url, int(info["tp_size"]), str(info["device"]))


class WeightSync:
    """The process group to a fixed set of servers, and the procedure that updates them."""

    def __init__(
        self,
        transport: Transport,
        servers: list[ServerFacts],
        config: SGLangConfig,
        shape: ModelShape | None,
        dtype: torch.dtype,
    ) -> None:
        """``shape`` is None if updates are not verified."""
        if len({server.device_type for server in servers}) != 1:
            raise RolloutError(f"servers on different kinds of device cannot be updated together: {servers}")
        self._transport = transport
        self._servers = servers
        self._config = config
        self._shape = shape
        self._dtype = dtype
        self._group_name = f"megatron_dppo_{uuid.uuid4().hex}"
        self._backend = "nccl" if servers[0].device_type == "cuda" else "gloo"
        self._device = torch.device("cuda", torch.cuda.current_device()) if self._backend == "nccl" else "cpu"
        self._deadline = 0.0
        self._store: TCPStore | None = None
        self._group: dist.ProcessGroup | None = None

    @property
    def urls(self) -> list[str]:
        """The servers that are updated."""
        return [server.url for server in self._servers]

    def update(self, named_tensors: NamedTensors, version: int) -> None:
        """Send all weights, verify them, and let generation continue as ``version``.

        Raises WeightSyncError if anything at all went wrong. Then the servers stay paused, so that no response is ever
        drawn by a mixture of old and new weights.
        """
        self._deadline = time.monotonic() + self._config.sync_timeout_s
        try:
            self._join_servers()
            self._post_all("/pause_generation", {"mode": "abort"})
            self._post_all("/flush_cache", {})
            self._begin()
            expected = self._send(named_tensors)
            self._post_all("/end_weight_update", {})
            self._verify(expected)
            self._post_all("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
            self._post_all("/continue_generation", {})
        except WeightSyncError:
            raise
        except RolloutError as error:
            raise WeightSyncError(f"weight update to version {version} failed: {error}") from error

    def _join_servers(self) -> None:
        """Make the process group, once. All members must come at the same time, so the servers are asked first."""
        if self._group is not None:
            return
        timeout = timedelta(seconds=self._config.sync_timeout_s)
        world_size = 1 + sum(server.tp_size for server in self._servers)
        address = self._config.master_address or _address_seen_from(self._servers[0].url)
        # Port 0: the system picks one, so two runs on a machine cannot collide.
        self._store = TCPStore(address, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        pending, rank_offset = [], 1
        for server in self._servers:
            body = {
                "master_address": address,
                "master_port": self._store.port,
                "rank_offset": rank_offset,
                "world_size": world_size,
                "group_name": self._group_name,
                "backend": self._backend,
            }
            pending.append(self._post(server.url, "/init_weights_update_group", body))
            rank_offset += server.tp_size
        self._group = _new_group(self._group_name, self._store, world_size, self._backend, timeout)
        self._wait(pending)

    def _begin(self) -> None:
        """Open the update on every server; one that a trainer left open when it died is closed first."""
        pending = {server.url: self._post(server.url, "/begin_weight_update", {}) for server in self._servers}
        for url, future in pending.items():
            try:
                self._wait([future])
            except RefusedRequestError:
                self._wait([self._post(url, "/end_weight_update", {})])
                self._wait([self._post(url, "/begin_weight_update", {})])

    def _send(self, named_tensors: NamedTensors) -> dict[int, ExpectedChecksums]:
        """Broadcast everything in buckets; returns what to expect of servers, by their tensor-parallel size."""
        expected: dict[int, ExpectedChecksums] = {}
        if self._shape is not None:
            for server in self._servers:
                expected[server.tp_size] = ExpectedChecksums(self._shape, server.tp_size, server.device_type)
        for bucket in _buckets(self._hashed(named_tensors, expected), self._config.bucket_bytes):
            try:
                self._wait_for_broadcast(*self._start_broadcast(bucket))
            except RefusedRequestError as error:
                raise WeightSyncError(f"{error}; concerns {self._tensors_meant(str(error), bucket)}") from error
        return expected

    def _tensors_meant(self, refusal: str, bucket: list[tuple[str, torch.Tensor]]) -> str:
        """The tensors of a bucket that a server speaks of: it names its own parameters, not the checkpoint's tensors."""
        names = [name for name, _ in bucket]
        if self._shape is not None:
            places = {name: placement(name, self._shape) for name in names}
            names = [name for name, place in places.items() if place and place.parameter in refusal] or names
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    def _hashed(
        self, named_tensors: NamedTensors, expected: dict[int, ExpectedChecksums]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors in the dtype that is served, hashed at once: an exporter that reuses a buffer is then found out."""
        for name, exported in named_tensors:
            tensor = exported.detach().to(device=self._device, dtype=self._dtype).contiguous()
            for checksums in expected.values():
                checksums.add(name, tensor)
            yield name, tensor

    def _start_broadcast(self, bucket: list[tuple[str, torch.Tensor]]) -> tuple[list[Future[Any]], dist.Work]:
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [dtype_name(tensor.dtype) for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        arrivals = [self._post(url, "/update_weights_from_distributed", body) for url in self.urls]
        work = dist.broadcast(flatten([tensor for _, tensor in bucket]), src=0, group=self._group, async_op=True)
        assert work is not None
        return arrivals, work

    def _wait_for_broadcast(self, arrivals: list[Future[Any]], sending: dist.Work) -> None:
        """Wait for the bytes and the servers' answers together: a dead server must not leave the broadcast waiting."""
        while not (sending.is_completed() and all(future.done() for future in arrivals)):
            self._wait([future for future in arrivals if future.done()])
            if time.monotonic() > self._deadline:
                raise WeightSyncError(f"a bucket of weights took longer than sync_timeout_s to reach {self.urls}")
            time.sleep(_POLL_S)
        self._wait(arrivals)
        try:
            sending.wait()
        except RuntimeError as error:
            raise WeightSyncError(f"broadcasting weights to {self.urls} failed: {error}") from error

    def _verify(self, expected: dict[int, ExpectedChecksums]) -> None:
        if not expected:
            return
        pending = [self._post(url, "/weights_checker", {"action": "checksum"}) for url in self.urls]
        for server, answer in zip(self._servers, self._wait(pending), strict=True):
            with reading(f"{server.url}/weights_checker"):
                ranks = sorted(answer["ranks"], key=lambda rank: rank["parallelism_info"][0]["tp_rank"])
                checksums = [dict(rank["checksums"]) for rank in ranks]
            faults = expected[server.tp_size].compare(checksums)
            if faults:
                listed = "\n  ".join(faults[:10])
                raise WeightSyncError(
                    f"{server.url} does not serve the weights that it was sent; wrong parameters: {len(faults)}\n  {listed}"
                )

    def _post(self, url: str, path: str, body: dict[str, Any]) -> Future[Any]:
        return self._transport.submit(self._transport.request(url, path, body, self._seconds_left()))

    def _post_all(self, path: str, body: dict[str, Any]) -> None:
        self._wait([self._post(url, path, body) for url in self.urls])

    def _wait(self, pending: list[Future[Any]]) -> list[Any]:
        """The answers, or the first error."""
        done, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in pending]

    def _seconds_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            limit = self._config.sync_timeout_s
            raise WeightSyncError(f"the weight update took longer than sync_timeout_s = {limit:g} s")
        return left

    def close(self) -> None:
        """Leave the process group, here and on the servers that still answer. Safe to call twice."""
        if self._group is None:
            return
        group, self._group = self._group, None
        self._deadline = time.monotonic() + self._config.control_timeout_s
        body = {"group_name": self._group_name}
        pending = [self._post(url, "/destroy_weights_update_group", body) for url in self.urls]
        concurrent.futures.wait(pending)  # a server that is gone has left already
        dist.destroy_process_group(group)
        self._store = None


def flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The bytes of the tensors one after the other: what a server's ``flattened_bucket`` expects."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])


def _buckets(named_tensors: NamedTensors, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Group tensors, in order, into lists of at most ``bucket_bytes`` (a larger tensor is a bucket of its own)."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _address_seen_from(url: str) -> str:
    """This machine's address on the route to a server. Nothing is sent: connecting a UDP socket only picks a route."""
    parts = urllib.parse.urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        return str(probe.getsockname()[0])


def _new_group(name: str, store: Store, world_size: int, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """Join the group as rank 0, by the steps that SGLang takes on its side.

    ``torch.distributed`` has no public way to make a group with processes outside the trainer's own world, and the
    prefix under which the members find each other in the store must be the same on both sides.
    """
    rendezvous = PrefixStore(name, store)
    with _nothing_to_split_from():
        group, _ = distributed_c10d._new_process_group_helper(
            world_size, 0, [], dist.Backend(backend), rendezvous, group_name=cast(Any, name), timeout=timeout
        )
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


@contextmanager
def _nothing_to_split_from() -> Iterator[None]:
    """Within: new groups over NCCL connect by themselves.

    Where the default group is bound to a device (distributed/ranks.py), torch would split them off its communicator, for
    which it needs all of the trainer's ranks. None but this one is here: it would wait for them for ever.
    """
    default = dist.group.WORLD
    device = None if default is None else default.bound_device_id
    if default is None or device is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = device
