"""Examples on their way from the rank that sampled them to the ranks that learn from them, as flat tensors.

Every rank knows every example's lengths and owner, so it knows the size and the place of everything that it gets: nothing is
announced, and nothing is pickled. A rank receives one buffer from each replica that sampled something for its own. In it each
field lies in one piece, one example's rows behind the other's, and examples are views into it. Three sections travel apart,
because not every rank needs all of them: tokens go to all ranks of the owning replica, what the loss reads to its last
pipeline stage, and expert choices to the stage that has the layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dppo.distributed.collectives import gather_objects
from megatron_dppo.distributed.point_to_point import Parcel, deliver
from megatron_dppo.training.data.micro_batch import ExampleFields, TrainingExample

_SCALARS = ("advantage", "trainable")  # of an example


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


class _Field(NamedTuple):
    """One field of all examples of a parcel.

    Attributes:
        name: in TrainingExample.
        dtype: in which it travels.
        rows: of each example.
        row_shape: of one row.
    """

    name: str
    dtype: torch.dtype
    rows: list[int]
    row_shape: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * sum(self.rows) * math.prod(self.row_shape)


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
        expected: list[tuple[int, list[_Field], list[int]]] = []
        for (source, owner), numbers in sorted(travelling.items()):
            for section, receivers in self._receivers[owner].items():
                fields = self._fields(section, [headers[number] for number in numbers])
                size = sum(field.num_bytes for field in fields)
                if self._rank == self._leaders[source]:
                    buffer = contents[len(parcels)] = torch.empty(size, dtype=torch.uint8, device="cpu")
                    for field, column in _columns(buffer, fields):
                        _fill(field, column, [sampled[number] for number in numbers], section.layers)
                if self._rank in receivers:
                    expected.append((len(parcels), fields, numbers))
                parcels.append(Parcel(self._leaders[source], receivers, size))
        received = deliver(parcels, contents)
        found: dict[int, dict[str, Any]] = {}
        for index, fields, numbers in expected:
            for field, column in _columns(received[index], fields):
                values = column.tolist() if field.name in _SCALARS else column.split(field.rows)
                for number, value in zip(numbers, values, strict=True):
                    found.setdefault(number, {})[field.name] = value
        return {
            number: TrainingExample(
                **values | {"prompt_length": headers[number].prompt_tokens, "trainable": bool(values["trainable"])}
            )
            for number, values in sorted(found.items())
        }

    def _fields(self, section: _Section, headers: Sequence[ExampleHeader]) -> list[_Field]:
        """What a section holds of these examples, in order."""
        responses = [header.tokens - header.prompt_tokens for header in headers]
        if section.name == "tokens":
            ones = [1] * len(headers)
            return [
                _Field("token_ids", torch.int32, [header.tokens for header in headers]),
                _Field("advantage", torch.float32, ones),
                _Field("trainable", torch.int32, ones),
            ]
        if section.name == "loss":
            fields = [_Field("rollout_log_probs", torch.float32, responses)]
            if topk := self._sampled.topk:
                fields.append(_Field("topk_ids", torch.int32, responses, (topk,)))
                fields.append(_Field("topk_log_probs", torch.float32, responses, (topk,)))
            return fields
        assert self._sampled.routed_experts is not None
        routed = [header.tokens - 1 for header in headers]
        row_shape = (len(section.layers), self._sampled.routed_experts[1])
        return [_Field("routed_experts", self._sampled.expert_dtype, routed, row_shape)]


def _columns(buffer: torch.Tensor, fields: Sequence[_Field]) -> Iterator[tuple[_Field, torch.Tensor]]:
    """Where in a parcel each field is: [rows of all examples, *row_shape]."""
    start = 0
    for field in fields:
        column = buffer[start : start + field.num_bytes].view(field.dtype)
        start += field.num_bytes
        yield field, column.view(sum(field.rows), *field.row_shape)


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


def _fill(field: _Field, column: torch.Tensor, examples: Sequence[TrainingExample], layers: tuple[int, ...]) -> None:
    values = [getattr(example, field.name) for example in examples]
    if field.name in _SCALARS:
        column.copy_(torch.tensor(values))
        return
    chosen = torch.tensor(layers, device="cpu")
    for rows, value in zip(column.split(field.rows), values, strict=True):
        if field.name == "routed_experts":
            # Straight into the parcel: these are large, and a copy of them would be as large again.
            torch.index_select(value.to(rows.dtype), 1, chosen, out=rows)
        else:
            rows.copy_(value)
