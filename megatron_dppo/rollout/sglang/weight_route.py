"""A way for the bytes of weights to the servers. There are two: ``BroadcastRoute`` and ``TensorRoute``.

What servers are told around it, and the proof that they serve what was sent, is not the route's: weight_sync.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_dppo.models.hf.export import Bucket
from megatron_dppo.rollout.engine import WeightSource
from megatron_dppo.rollout.sglang.checksums import ExpectedChecksums
from megatron_dppo.rollout.sglang.update_meeting import Meeting


class WeightRoute(Protocol):
    """Made by every rank of the trainer. Rank 0 also speaks to the servers, in another thread."""

    def ranks(self, buckets: Sequence[Bucket]) -> frozenset[int]:
        """Who has a part in sending these, rank 0 among them."""
        ...

    def is_open_for(self, buckets: Sequence[Bucket]) -> bool:
        """Whether the way to the servers that there is, if there is one, is that for these. The same on every rank."""
        ...

    def meet(self, meeting: Meeting | None, buckets: Sequence[Bucket]) -> None:
        """Take this way from now on: called before the first update, and where it was not open."""
        ...

    async def connect(self) -> None:
        """On rank 0: tell the servers of the way, if they have to know. Called first in every update."""
        ...

    async def load(self, index: int, bucket: Bucket) -> None:
        """On rank 0: wait for a bucket from its sender, and let the servers load it. Called in order."""
        ...

    def send(self, weights: WeightSource, buckets: Sequence[Bucket], kinds: Sequence[ExpectedChecksums]) -> None:
        """This rank's part in an update. What it has put together it adds to ``kinds``.

        When it has returned, it holds no memory of a GPU for this update any more.
        """
        ...

    async def leave(self) -> None:
        """On rank 0: let the servers forget the way, as far as they still answer."""
        ...

    def close(self) -> None:
        """Forget the way on this rank. Safe to call twice."""
        ...


def flatten(tensors: Sequence[torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
    """The bytes of the tensors one after the other, in ``buffer``: what a server's ``flattened_bucket`` expects."""
    sizes = [tensor.nbytes for tensor in tensors]
    flat = buffer[: sum(sizes)]
    for part, tensor in zip(flat.split(sizes), tensors, strict=True):
        part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return flat


def num_bytes(bucket: Bucket, dtype: torch.dtype) -> int:
    """Of a bucket on its way."""
    return dtype.itemsize * sum(math.prod(shape) for _, shape in bucket.tensors)
