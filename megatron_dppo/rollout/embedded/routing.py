"""The embedded engine's record of expert choices: of all layers, on every rank of a replica, whatever stage holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_dppo.distributed.collectives import gather_objects
from megatron_dppo.models.routing_replay import RoutingRecorder


class ReplicaRouting:
    """Records the expert choices of a replica's policy, whose pipeline stages hold different layers."""

    def __init__(self, model_chunks: Sequence[torch.nn.Module], group: dist.ProcessGroup) -> None:
        """Collective over ``group``, the ranks of the replica. Raises ValueError if the policy cannot record."""
        self.recorder = RoutingRecorder(model_chunks)
        self.group = group
        layers_of_rank = gather_objects(tuple(self.recorder.layers), group=group)
        # Ranks with the same layers compute the same tokens: the first of them speaks for all.
        self.owners: dict[tuple[int, ...], int] = {}
        for rank, layers in zip(dist.get_process_group_ranks(group), layers_of_rank, strict=True):
            self.owners.setdefault(layers, rank)
        owned = [layer for layers in self.owners for layer in layers]
        self.order = sorted(range(len(owned)), key=owned.__getitem__)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around all forward passes that are to be recorded."""
        with self.recorder.recording():
            yield

    def gather(self, own_BSLk: torch.Tensor) -> torch.Tensor:
        """[B, S, layers of this rank, k] -> [B, S, all layers in order, k] on the CPU. Collective over the replica."""
        batch, length, _, k = own_BSLk.shape
        parts = []
        for layers, owner in self.owners.items():
            part = (
                own_BSLk.contiguous() if dist.get_rank() == owner else own_BSLk.new_empty(batch, length, len(layers), k)
            )
            if self.group.size() > 1:
                dist.broadcast(part, owner, group=self.group)
            parts.append(part.cpu())
        return torch.cat(parts, dim=2)[:, :, self.order]


class BatchRouting:
    """The expert choices of one batch of responses: those of the prompts are recorded once, before they are repeated."""

    def __init__(self, replica: ReplicaRouting, prompts: int, source: Sequence[int], limit: int) -> None:
        """``source``: for each response, which of the ``prompts`` it answers; ``limit``: most tokens per response."""
        self._replica = replica
        self._prompts = prompts
        self._source = source
        self._limit = limit
        self._prefill_PLlk: torch.Tensor | None = None
        self._decoded_BTlk: torch.Tensor | None = None

    def take_prefill(self) -> None:
        """After the forward pass over the (left-padded) prompts."""
        prefill = self._replica.recorder.take(self._prompts)
        self._prefill_PLlk = prefill
        # A response's last token is drawn and never read.
        self._decoded_BTlk = prefill.new_zeros(len(self._source), self._limit - 1, *prefill.shape[2:])

    def take_decoded(self, rows: torch.Tensor, step: int) -> None:
        """After the forward pass over the tokens drawn in ``step`` (from 0) for the responses ``rows``."""
        assert self._decoded_BTlk is not None
        self._decoded_BTlk[rows, step] = self._replica.recorder.take(len(rows))[:, 0]

    def gather(self) -> None:
        """Bring all layers' choices to every rank of the replica. Collective."""
        assert self._prefill_PLlk is not None
        assert self._decoded_BTlk is not None
        self._prefill_PLlk = self._replica.gather(self._prefill_PLlk)
        self._decoded_BTlk = self._replica.gather(self._decoded_BTlk)

    def of_response(self, row: int, prompt_length: int, length: int) -> torch.Tensor:
        """[prompt + length - 1, layers, k] int32: ``Sample.routed_experts``; after ``gather``."""
        assert self._prefill_PLlk is not None
        assert self._decoded_BTlk is not None
        prompt = self._prefill_PLlk[self._source[row], self._prefill_PLlk.shape[1] - prompt_length :]
        return torch.cat([prompt, self._decoded_BTlk[row, : length - 1]])
