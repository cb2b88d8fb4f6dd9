"""From a replica's part of a schedule and its examples to micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.core import parallel_state

from megatron_dppo.training.data.micro_batch import ExampleFields, MicroBatch, TrainingExample, make_micro_batch
from megatron_dppo.training.data.schedule import PADDING, PlannedMicroBatch, Scheduler
from megatron_dppo.training.data.token_layout import TokenLayout, packed_layout, padded_layout


@dataclass(frozen=True)
class ReplicaBatch:
    """What one replica learns from.

    Attributes:
        steps: its micro-batches of each optimizer step.
        examples: number -> example, of those that the steps name.
        fields: what the examples have, also if there are none.
    """

    steps: Sequence[Sequence[PlannedMicroBatch]]
    examples: Mapping[int, TrainingExample]
    fields: ExampleFields


class MicroBatcher:
    """Lays examples out as the schedules of a ``Scheduler`` say, for this context-parallel rank.

    Args:
        scheduler: made the schedules.
        log_prob_floor: see ``make_micro_batch``.
    """

    def __init__(self, scheduler: Scheduler, log_prob_floor: float = -math.inf) -> None:
        self._log_prob_floor = log_prob_floor
        self._packed = scheduler.packed
        self._sequence_multiple = scheduler.sequence_multiple

    def micro_batches(self, batch: ReplicaBatch, step: int) -> list[MicroBatch]:
        """This rank's part of its replica's micro-batches of one optimizer step, in order."""
        available = {**batch.examples, PADDING: batch.fields.padding_example()}
        return [self._micro_batch(one, [available[number] for number in one.sequences]) for one in batch.steps[step]]

    def _micro_batch(self, planned: PlannedMicroBatch, examples: Sequence[TrainingExample]) -> MicroBatch:
        return make_micro_batch(
            examples,
            planned.sequences,
            self._layout([len(example.token_ids) for example in examples], planned.row_length),
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
            self._log_prob_floor,
        )

    def _layout(self, lengths: Sequence[int], row_length: int) -> TokenLayout:
        if self._packed:
            return packed_layout(lengths, self._sequence_multiple, row_length)
        return padded_layout(lengths, row_length)
