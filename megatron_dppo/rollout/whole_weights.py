"""Weights that one rank has whole, for an engine: of a checkpoint, of a transformers model, of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_dppo.models.hf.export import Bucket, NamedShape, group_by_size


class WholeWeights:
    """A ``WeightSource`` (rollout/engine.py) of tensors by their Hugging Face names; rank 0 sends them.

    Every rank has to know names and shapes; the others' numbers are not read.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def buckets(self, *, dtype: torch.dtype, bucket_bytes: int, max_senders: int) -> list[Bucket]:
        """See ``WeightSource``. There is one sender, whatever ``max_senders`` is."""
        shapes = [NamedShape(name, tuple(tensor.shape)) for name, tensor in self._tensors.items()]
        sizes = [tensor.numel() * dtype.itemsize for tensor in self._tensors.values()]
        return [Bucket(0, (0,), tuple(group)) for group in group_by_size(shapes, sizes, bucket_bytes)]

    def fetch(
        self, buckets: Sequence[Bucket], *, dtype: torch.dtype, wait: Callable[[dist.Work], None]
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """See ``WeightSource``."""
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        for index, bucket in enumerate(buckets):
            yield index, [self._tensors[name].detach().to(dtype) for name, _ in bucket.tensors]

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``WeightSource``."""
        yield from self._tensors.items()
