"""Examples on their way from the rank that sampled them to the ranks that learn from them, as flat tensors.

Every rank knows every example's lengths and owner, so it knows the size and the place of everything that it gets: nothing is
announced, and nothing is pickled. A rank receives one buffer from each replica that sampled something for its own, and its
examples are views into these. Three sections travel apart, because not every rank needs all of them: tokens go to all ranks
of the owning replica, what the loss reads to its last pipeline stage, and expert choices to the stage that has the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dppo.distributed.collectives import gather_objects
from megatron_dppo.distributed.point_to_point import Parcel, deliver
from megatron_dppo.training.data.micro_batch import ExampleFields, TrainingExample


class ExampleHeader(NamedTuple):
    """What every rank knows of an example.

    Attributes:
        source: the replica that sampled it.
        prompt_tokens: length of the prompt.
        tokens: of prompt and response.
    """

    source: int
    prompt_tokens: int
    tokens: int


class _Section(NamedTuple):
    """What travels together; ``layers``: of the expert choices."""

    name: str
    layers: tuple[int, ...] = ()


class _Tensor(NamedTuple):
    """One tensor of an example within a section."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class _Place:
    """Where a rank stands, and what it needs."""

    replica: int
    is_last_stage: bool
    routed_layers: tuple[int, ...]


class HandOver:
    """Moves examples between replicas. Made, and used, by all ranks together.

    Attributes:
        fields: what examples have on this rank once they were handed over.
        is_leader: whether this rank has the examples that its replica samples. It is the replica's first.
    """

    def __init__(self, sampled: ExampleFields, routed_layers: Sequence[int] = ()) -> None:
        """``sampled``: what examples have where they are sampled. ``routed_layers``: the layers whose expert choices this
        rank replays.
        """
        self._sampled = sampled
        self._rank = dist.get_rank()
        self._replica = parallel_state.get_data_parallel_rank()
        is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        places = gather_objects(_Place(self._replica, is_last_stage, tuple(routed_layers)))
        self._receivers = [
            _receivers(sampled, {rank: place for rank, place in enumerate(places) if place.replica == replica})
            for replica in range(parallel_state.get_data_parallel_world_size())
        ]
        self._leaders = [sections[_Section("tokens")][0] for sections in self._receivers]
        self.is_leader = self._leaders[self._replica] == self._rank
        experts = sampled.routed_experts
        self.fields = ExampleFields(
            rollout_log_probs=sampled.rollout_log_probs and is_last_stage,
            topk=sampled.topk if is_last_stage else 0,
            routed_experts=None if experts is None else (len(routed_layers), experts[1]),
            expert_dtype=sampled.expert_dtype,
        )

    def hand_over(
        self, sampled: Mapping[int, TrainingExample], headers: Mapping[int, ExampleHeader], owners: Mapping[int, int]
    ) -> dict[int, TrainingExample]:
        """This replica's examples, on each of its ranks. Collective over all ranks.

        Args:
            sampled: number -> example, those of this replica, on its leader; nobody looks at what other ranks give.
            headers: number -> header, of every example of every replica; the same on all ranks.
            owners: number -> the replica that learns from it; the same on all ranks.
        """
        travelling: dict[tuple[int, int], list[int]] = {}  # (source, owner) -> numbers
        for number in sorted(owners):
            travelling.setdefault((headers[number].source, owners[number]), []).append(number)
        parcels: list[Parcel] = []
        contents: dict[int, torch.Tensor] = {}
        expected: list[tuple[int, _Section, list[int]]] = []
        for (source, owner), numbers in sorted(travelling.items()):
            for section, receivers in self._receivers[owner].items():
                of_numbers = {number: headers[number] for number in numbers}
                size = sum(t.num_bytes for header in of_numbers.values() for t in self._tensors(section, header))
                if self._rank == self._leaders[source]:
                    buffer = contents[len(parcels)] = torch.empty(size, dtype=torch.uint8, device="cpu")
                    for number, views in self._views(buffer, section, of_numbers):
                        _fill(views, section, sampled[number])
                if self._rank in receivers:
                    expected.append((len(parcels), section, numbers))
                parcels.append(Parcel(self._leaders[source], receivers, size))
        received = deliver(parcels, contents)
        found: dict[int, dict[str, torch.Tensor]] = {}
        for index, section, numbers in expected:
            for number, views in self._views(received[index], section, {n: headers[n] for n in numbers}):
                found.setdefault(number, {}).update(views)
        return {number: _example(views, headers[number]) for number, views in sorted(found.items())}

    def _views(
        self, buffer: torch.Tensor, section: _Section, headers: Mapping[int, ExampleHeader]
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Where in a parcel the tensors of each example are."""
        start = 0
        for number, header in headers.items():
            views = {}
            for tensor in self._tensors(section, header):
                views[tensor.name] = buffer[start : start + tensor.num_bytes].view(tensor.dtype).view(tensor.shape)
                start += tensor.num_bytes
            yield number, views

    def _tensors(self, section: _Section, header: ExampleHeader) -> list[_Tensor]:
        response = header.tokens - header.prompt_tokens
        if section.name == "tokens":
            return [
                _Tensor("token_ids", torch.int32, (header.tokens,)),
                _Tensor("advantage", torch.float32, (1,)),
                _Tensor("trainable", torch.int32, (1,)),
            ]
        if section.name == "loss":
            tensors = [_Tensor("rollout_log_probs", torch.float32, (response,))]
            if topk := self._sampled.topk:
                tensors.append(_Tensor("topk_ids", torch.int32, (response, topk)))
                tensors.append(_Tensor("topk_log_probs", torch.float32, (response, topk)))
            return tensors
        assert self._sampled.routed_experts is not None
        shape = (header.tokens - 1, len(section.layers), self._sampled.routed_experts[1])
        return [_Tensor("routed_experts", self._sampled.expert_dtype, shape)]


def _receivers(sampled: ExampleFields, places: Mapping[int, _Place]) -> dict[_Section, tuple[int, ...]]:
    """Which of a replica's ranks need which section."""
    receivers = {_Section("tokens"): tuple(places)}
    if sampled.rollout_log_probs:
        receivers[_Section("loss")] = tuple(rank for rank, place in places.items() if place.is_last_stage)
    if sampled.routed_experts is not None:
        for layers in sorted({place.routed_layers for place in places.values()}):
            ranks = tuple(rank for rank, place in places.items() if place.routed_layers == layers)
            receivers[_Section("experts", layers)] = ranks
    return receivers


def _fill(views: Mapping[str, torch.Tensor], section: _Section, example: TrainingExample) -> None:
    for name, view in views.items():
        value = getattr(example, name)
        if name == "routed_experts":
            # Straight into the parcel: these are large, and a copy of them would be as large again.
            torch.index_select(value.to(view.dtype), 1, torch.tensor(section.layers, device="cpu"), out=view)
            continue
        view.copy_(value if isinstance(value, torch.Tensor) else torch.tensor([value]))


def _example(tensors: Mapping[str, torch.Tensor], header: ExampleHeader) -> TrainingExample:
    return TrainingExample(
        token_ids=tensors["token_ids"],
        prompt_length=header.prompt_tokens,
        advantage=float(tensors["advantage"]),
        rollout_log_probs=tensors.get("rollout_log_probs"),
        topk_ids=tensors.get("topk_ids"),
        topk_log_probs=tensors.get("topk_log_probs"),
        routed_experts=tensors.get("routed_experts"),
        trainable=bool(tensors["trainable"]),
    )
