"""From this replica's examples of an optimizer step to its micro-batches, in step with the other replicas.

Every data-parallel rank runs the same number of micro-batches: the replicas of an MoE policy hold each other's experts, so
a forward pass of one waits for all. A replica with less work repeats a sequence that counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from megatron.core import parallel_state

from megatron_dppo.distributed.collectives import max_over_ranks
from megatron_dppo.distributed.layout import ParallelConfig
from megatron_dppo.training.config.schema import TrainConfig
from megatron_dppo.training.data.micro_batch import PADDING, MicroBatch, TrainingExample, make_micro_batch
from megatron_dppo.training.data.packing import (
    TokenLayout,
    fewest_packed_groups,
    packed_groups,
    packed_layout,
    padded_groups,
    padded_layout,
    round_up,
)


class MicroBatcher:
    """Splits examples as the configuration says and as the parallel layout needs it.

    Args:
        train: how to batch, and how much at once.
        parallel: the layout, which is initialised.
    """

    def __init__(self, train: TrainConfig, parallel: ParallelConfig) -> None:
        self._packed = train.batching == "packed"
        self._budget = train.tokens_per_micro_batch
        self._size = train.micro_batch_size
        self._context_parallel_size = parallel.context_parallel_size
        # Context parallelism cuts every sequence into 2 CP chunks; sequence parallelism what a rank then has into TP parts.
        self._sequence_multiple = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
        sequence_parallel = parallel.tensor_model_parallel_size if parallel.uses_sequence_parallel else 1
        self._row_multiple = math.lcm(self._sequence_multiple, parallel.context_parallel_size * sequence_parallel)
        # Pipeline stages send each other tensors of one shape, and take micro-batches in turns of PP if interleaved.
        self._equal_shapes = parallel.pipeline_model_parallel_size > 1
        self._count_multiple = parallel.pipeline_model_parallel_size if parallel.chunks_per_stage > 1 else 1
        # This dispatcher gathers the tokens of all ranks that share experts, which takes equal shapes on all of them.
        self._equal_over_replicas = (
            parallel.expert_model_parallel_size > 1 and parallel.moe_token_dispatcher == "allgather"
        )

    def micro_batches(self, examples: Sequence[TrainingExample]) -> list[MicroBatch]:
        """This replica's micro-batches (its context-parallel rank's part), the largest first. Collective.

        ``examples`` are the replica's share of one optimizer step, at least one.
        """
        groups = self._groups([len(e.token_ids) for e in examples])
        filler = replace(min(examples, key=lambda e: len(e.token_ids)), trainable=False)
        chosen = [[(i, filler if i == PADDING else examples[i]) for i in group] for group in groups]
        lengths = [[len(e.token_ids) for _, e in group] for group in chosen]
        rows = self._row_lengths(lengths)
        return [
            make_micro_batch(
                [example for _, example in group],
                [index for index, _ in group],
                self._layout(group_lengths, row),
                self._context_parallel_size,
                parallel_state.get_context_parallel_rank(),
            )
            for group, group_lengths, row in zip(chosen, lengths, rows, strict=True)
        ]

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of each micro-batch's examples; as many groups as on every other replica, none of them empty."""
        if self._packed:
            padded = [round_up(length, self._sequence_multiple) for length in lengths]
            count = self._agree_on(fewest_packed_groups(padded, self._budget))
            groups = packed_groups(padded, self._budget, round_up(count, self._count_multiple))
            return [group or [PADDING] for group in groups]
        groups = padded_groups(lengths, self._size)
        count = round_up(self._agree_on(len(groups)), self._count_multiple)
        rows = len(groups[0]) if self._equal_shapes or self._equal_over_replicas else 1
        return groups + [[PADDING] * rows] * (count - len(groups))

    def _row_lengths(self, lengths: Sequence[Sequence[int]]) -> list[int]:
        """S of every micro-batch, over all context-parallel ranks."""
        if self._packed:
            tokens = [sum(round_up(length, self._sequence_multiple) for length in group) for group in lengths]
        else:
            tokens = [max(group) for group in lengths]
        rows = [round_up(count, self._row_multiple) for count in tokens]
        if self._equal_over_replicas:
            return [self._agree_on(max(rows))] * len(rows)
        return [max(rows)] * len(rows) if self._equal_shapes else rows

    def _layout(self, lengths: Sequence[int], row_length: int) -> TokenLayout:
        if self._packed:
            return packed_layout(lengths, self._sequence_multiple, row_length)
        return padded_layout(lengths, row_length)

    def _agree_on(self, value: int) -> int:
        """The largest of the replicas' values."""
        return int(max_over_ranks([value], group=parallel_state.get_data_parallel_group())[0])
