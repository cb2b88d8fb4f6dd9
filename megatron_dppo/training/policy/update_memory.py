"""The memory that a policy's updates need and nothing else does, which can make room on the device for servers in between.

gradients                                    dropped: every optimizer step begins by zeroing them
Adam's moments, fp32 main parameters,        moved to (pinned) host memory and back, bit for bit; there they can be
frozen copies of weights                     read as ever, so a checkpoint can be saved meanwhile
weights                                      stay: the next sync reads them
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_dppo.training.checkpoint.optimizer_state import optimizer_shards
from megatron_dppo.training.policy.frozen_weights import FrozenWeights
from megatron_dppo.training.policy.trainable import OptimizerState, TrainablePolicy


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of this rank, as they were put away last.

    Attributes:
        moved: that are in host memory meanwhile.
        dropped: that are nowhere.
        stays: on the device: all that torch has allocated there; on a CPU the weights, which it does not count.
    """

    moved: int
    dropped: int
    stays: int


class UpdateMemory:
    """Of a policy on this rank. What is put away, or brought back, twice stays as it is."""

    def __init__(
        self,
        policy: TrainablePolicy,
        optimizer_state: OptimizerState | None = None,
        frozen: Sequence[FrozenWeights] = (),
    ) -> None:
        """``optimizer_state``: None before there is one."""
        self._policy = policy
        self._optimizer_state = optimizer_state
        self._frozen = list(frozen)
        self._device = next(policy.chunks[0].parameters()).device
        self._away: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor, its memory on the host)
        self._on_host = WeakTensorKeyDictionary()  # tensor -> its memory there: pinning takes long, so it is kept
        self.report = MemoryReport(0, 0, 0)

    @torch.no_grad()
    def put_away(self) -> None:
        """Leave the device to others, as far as this memory goes."""
        if self._away:
            return
        if self._optimizer_state is not None:
            self._optimizer_state.optimizer.zero_grad()  # main parameters have views of gradients
        for tensor in _distinct(self._tensors()):
            host = self._host_memory(tensor)
            host.copy_(tensor, non_blocking=True)
            self._away.append((tensor, host))
        self._synchronize()
        for tensor, host in self._away:
            tensor.data = host
        dropped = sum(gradient.nbytes for gradient in self._gradients())
        for gradient in self._gradients():
            gradient.untyped_storage().resize_(0)
        moved = sum(host.nbytes for _, host in self._away)
        self.report = MemoryReport(moved, dropped, self._stays())

    @torch.no_grad()
    def bring_back(self) -> None:
        """Have all of it where the optimizer step expects it. Gradients are zero."""
        for tensor, host in self._away:
            tensor.data = torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)
        self._away = []
        for gradient in self._gradients():
            if gradient.untyped_storage().nbytes() == 0:
                gradient.untyped_storage().resize_(gradient.nbytes)
                gradient.zero_()
        self._synchronize()

    def _tensors(self) -> Iterator[torch.Tensor]:
        """What is moved."""
        if self._optimizer_state is not None:
            for shard in optimizer_shards(self._optimizer_state.optimizer):
                yield from (value for value in shard.state.values() if self._is_on_device(value))
                # Of the parameter's dtype it is the weight itself, or a view of it.
                if shard.main.dtype is not shard.parameter.dtype and self._is_on_device(shard.main):
                    yield shard.main
        for frozen in self._frozen:
            yield from frozen.tensors

    def _is_on_device(self, value: object) -> bool:
        """Adam counts steps in tensors of one element on the host."""
        return isinstance(value, torch.Tensor) and value.device == self._device and value.dim() > 0

    def _gradients(self) -> Iterator[torch.Tensor]:
        """Megatron's buffers: every parameter's gradient is a view of one of them."""
        for chunk in self._policy.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data

    def _host_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in self._on_host:
            self._on_host[tensor] = torch.empty_like(
                tensor, device="cpu", memory_format=torch.contiguous_format, pin_memory=self._device.type == "cuda"
            )
        host: torch.Tensor = self._on_host[tensor]
        return host

    def _stays(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            return torch.cuda.memory_allocated(self._device)
        return sum(parameter.nbytes for chunk in self._policy.chunks for parameter in chunk.parameters())

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _distinct(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
