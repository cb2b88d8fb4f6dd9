"""How long new weights take to reach the servers: counted bytes and calls, times what links do (docs/weight_sync.md).

Buckets are planned as a run plans them (models/hf/export.py) and sent as a run sends them: every sender puts one together
while another is on its way; servers take them one after the other. Rates are of the slowest link or device on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from megatron_dppo.distributed.parallel_config import ParallelConfig
from megatron_dppo.models.hf.export import Bucket, ExportPlan, Place
from megatron_dppo.training.config.schema import MODEL_DTYPES, Config

_CONTROL_CALLS = 6  # pause, flush, begin, end, label, continue


@dataclass(frozen=True)
class Rates:
    """Bytes and seconds.

    Attributes:
        network: bytes/s from a sender to every server at once.
        gather: bytes/s from the ranks that hold shards to the one that puts them together.
        message: seconds for each of these messages.
        copy: bytes/s of putting a bucket together.
        hash: bytes/s of the hash, on a sender.
        call: seconds from telling a server something until it acts, and back.
        load: bytes/s of copying what arrived into the served parameters.
        tensor: seconds for each tensor of it.
        checksum: bytes/s of the server's hash of its own parameters.
    """

    network: float = 45e9
    gather: float = 40e9
    message: float = 50e-6
    copy: float = 1e12
    hash: float = 1e12
    call: float = 5e-3
    load: float = 5e11
    tensor: float = 60e-6
    checksum: float = 1e12


@dataclass(frozen=True)
class Forecast:
    """Seconds of an update and of its parts; what overlaps is in several of them."""

    total: float
    on_the_wire: float
    loading: float
    calls: float
    putting_together: float
    verifying: float


def forecast(
    buckets: Sequence[Bucket], gathered: Sequence[tuple[int, int]], itemsize: int, server_ranks: int, rates: Rates
) -> Forecast:
    """Go through an update bucket by bucket.

    Args:
        buckets: in order.
        gathered: of each, (messages, bytes) that its sender gets from other ranks.
        itemsize: bytes of an element that is served.
        server_ranks: of a server; each hashes its part.
        rates: of everything.
    """
    prepared: dict[int, float] = {}  # sender -> when its thread is free
    sent: dict[int, float] = {}  # sender -> when its last bucket is gone
    servers = 3 * rates.call  # pause, flush, begin
    wire = loading = together = hashed = 0.0
    for bucket, (messages, num_gathered) in zip(buckets, gathered, strict=True):
        size = itemsize * sum(math.prod(shape) for _, shape in bucket.tensors)
        preparing = messages * rates.message + num_gathered / rates.gather + size / rates.copy
        begins = max(prepared.get(bucket.sender, 0.0) + preparing, sent.get(bucket.sender, 0.0))
        arrives = max(servers + rates.call, begins) + size / rates.network
        storing = size / rates.load + len(bucket.tensors) * rates.tensor
        servers = arrives + storing
        sent[bucket.sender] = arrives
        prepared[bucket.sender] = begins + size / rates.hash
        wire += size / rates.network
        loading += storing
        together += preparing
        hashed += size
    verifying = hashed / server_ranks / rates.checksum + rates.call
    total = max(servers, *prepared.values()) + verifying + 3 * rates.call
    calls = (len(buckets) + _CONTROL_CALLS + 1) * rates.call
    return Forecast(total, wire, loading, calls, together, verifying)


def places_of_one_copy(parallel: ParallelConfig, num_layers: int) -> list[Place]:
    """Of the ranks that hold one copy of the policy, experts included."""
    width = max(parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size * parallel.expert_tensor_size)
    places, first = [], 0
    for stage, layers in enumerate(parallel.layers_of_stages(num_layers)):
        for rank in range(width):
            places.append(
                Place(
                    stage=stage,
                    layers=frozenset(range(first, first + layers)),
                    tensor_rank=rank % parallel.tensor_model_parallel_size,
                    expert_tensor_rank=rank % parallel.expert_tensor_size,
                    expert_rank=rank // parallel.expert_tensor_size % parallel.expert_model_parallel_size,
                )
            )
        first += layers
    return places


def messages_of(plan: ExportPlan, bucket: Bucket, itemsize: int) -> tuple[int, int]:
    """(messages, bytes) that a bucket's sender gets from other ranks."""
    from_others = [shard for shard in plan.shards(bucket) if shard.holder != bucket.sender]
    size = itemsize * sum(math.prod(shard.shape) for shard in from_others)
    return len({shard.holder for shard in from_others}), size


@dataclass(frozen=True)
class PlannedSync:
    """An update before it takes place.

    Attributes:
        buckets: in order.
        gathered: of each, (messages, bytes) that its sender gets from other ranks.
        dtype: that is served.
        holders: ranks that hold one copy of the policy.
    """

    buckets: list[Bucket]
    gathered: list[tuple[int, int]]
    dtype: torch.dtype
    holders: int

    def forecast(self, server_ranks: int, rates: Rates) -> Forecast:
        """How long it takes, with servers of so many ranks."""
        return forecast(self.buckets, self.gathered, self.dtype.itemsize, server_ranks, rates)

    @property
    def nbytes(self) -> int:
        """Of all weights, as they are served."""
        return sum(self.dtype.itemsize * math.prod(shape) for bucket in self.buckets for _, shape in bucket.tensors)


def planned_sync(config: Config, hf_config: PretrainedConfig) -> PlannedSync:
    """The update of a run's servers."""
    sglang = config.rollout.sglang
    places = places_of_one_copy(config.parallel, hf_config.num_hidden_layers)
    plan = ExportPlan(hf_config, places)
    dtype = getattr(torch, sglang.dtype) if sglang.dtype else MODEL_DTYPES[config.model.dtype]
    buckets = plan.buckets(dtype=dtype, bucket_bytes=sglang.bucket_bytes, max_senders=sglang.max_senders)
    gathered = [messages_of(plan, bucket, dtype.itemsize) for bucket in buckets]
    return PlannedSync(buckets, gathered, dtype, len(places))
