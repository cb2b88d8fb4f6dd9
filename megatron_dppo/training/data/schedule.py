"""Which replica computes which sequences of an optimizer step, in which micro-batches.

The lengths of all sequences of all replicas are known to every rank, and each works out the same schedule: nothing has to be
agreed on afterwards. It aims at ranks that never wait for each other. Replicas of an MoE policy hold each other's experts
and meet in every layer, so micro-batch m should cost the same on all of them; replicas of a dense one meet at the step's
end, so the totals should. Every replica runs the same number of micro-batches, the fewest that the token budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_dppo.distributed.parallel_config import ParallelConfig
from megatron_dppo.training.config.schema import TrainConfig
from megatron_dppo.training.data.partition import balanced_groups, fewest_groups
from megatron_dppo.training.data.token_layout import round_up

PADDING = -1  # in place of a sequence's number: one that only fills a slot
PADDING_LENGTH = 2  # a prompt of one token and a response of one, which counts for nothing

CostOf = Callable[[int], float]  # length -> time, in any unit; see models/flops.py


@dataclass(frozen=True)
class PlannedMicroBatch:
    """One forward pass of a replica.

    Attributes:
        sequences: their numbers; PADDING for one that only fills a slot. Never empty.
        row_length: S over all context-parallel ranks.
    """

    sequences: tuple[int, ...]
    row_length: int


@dataclass(frozen=True)
class Schedule:
    """One optimizer step: the micro-batches of each replica, as many on each, the most expensive first."""

    replicas: tuple[tuple[PlannedMicroBatch, ...], ...]

    def owners(self) -> dict[int, int]:
        """Sequence -> the replica that learns from it."""
        return {
            sequence: replica
            for replica, micro_batches in enumerate(self.replicas)
            for micro_batch in micro_batches
            for sequence in micro_batch.sequences
            if sequence != PADDING
        }


class Scheduler:
    """Makes schedules as the configuration says and as the parallel layout needs it.

    Args:
        train: how to batch, and how much at once.
        parallel: the layout.
        replicas: copies of the policy.
        cost_of: what a sequence of a length costs.
    """

    def __init__(self, train: TrainConfig, parallel: ParallelConfig, replicas: int, cost_of: CostOf) -> None:
        self.replicas = replicas
        self.packed = train.batching == "packed"
        self._budget = train.tokens_per_micro_batch
        self._size = train.micro_batch_size
        self.cost_of = cost_of
        # Context parallelism cuts every sequence into 2 CP chunks; sequence parallelism what a rank then has into TP parts.
        self.sequence_multiple = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
        sequence_parallel = parallel.tensor_model_parallel_size if parallel.uses_sequence_parallel else 1
        self.row_multiple = math.lcm(self.sequence_multiple, parallel.context_parallel_size * sequence_parallel)
        # Pipeline stages send each other tensors of one shape, and take micro-batches in turns of PP if interleaved.
        self._equal_shapes = parallel.pipeline_model_parallel_size > 1
        self._count_multiple = parallel.pipeline_model_parallel_size if parallel.chunks_per_stage > 1 else 1
        # This dispatcher gathers the tokens of all ranks that share experts, which takes equal shapes on all of them.
        self._equal_over_replicas = (
            parallel.expert_model_parallel_size > 1 and parallel.moe_token_dispatcher == "allgather"
        )

    def schedules(self, lengths: Mapping[int, int], steps: int) -> list[Schedule]:
        """Of so many optimizer steps (fewer, if there are fewer sequences), each with some of the sequences of every prompt.

        Sequences of one prompt have consecutive numbers. The same on every rank, and the same steps in every layout.
        """
        numbers = sorted(lengths)
        shares = [numbers[step::steps] for step in range(steps)]
        return [self.schedule({number: lengths[number] for number in share}) for share in shares if share]

    def schedule(self, lengths: Mapping[int, int]) -> Schedule:
        """Of one optimizer step on the sequences ``number -> tokens``, at least one. The same on every rank."""
        lengths = dict(sorted(lengths.items()))
        groups = self._packed_groups(lengths) if self.packed else self._padded_groups(lengths)
        by_cost = sorted(groups, key=lambda group: -self._cost(group, lengths))
        of_replica: list[list[tuple[int, ...]]] = [[] for _ in range(self.replicas)]
        total = [0.0] * self.replicas
        for first in range(0, len(by_cost), self.replicas):
            # The most expensive of those that run at the same time goes to whoever had the least to do so far.
            for replica, group in zip(
                sorted(range(self.replicas), key=lambda replica: total[replica]),
                by_cost[first : first + self.replicas],
                strict=True,
            ):
                of_replica[replica].append(tuple(group) or (PADDING,))
                total[replica] += self._cost(group, lengths)
        return self._with_rows(of_replica, lengths)

    def efficiency(self, schedule: Schedule, lengths: Mapping[int, int], coupled: bool) -> float:
        """Mean over replicas of the work in a step, as a share of what the slowest takes.

        ``coupled``: replicas wait for each other in every micro-batch (expert parallelism), and not at the step's end only.
        """
        costs = [[self._cost(m.sequences, lengths) for m in micro_batches] for micro_batches in schedule.replicas]
        mean = sum(map(sum, costs)) / len(costs)
        slowest = sum(map(max, zip(*costs, strict=True))) if coupled else max(map(sum, costs))
        return mean / slowest

    def _cost(self, group: Sequence[int], lengths: Mapping[int, int]) -> float:
        tokens = [lengths[sequence] for sequence in group if sequence != PADDING]
        if self.packed or not tokens:
            return sum(map(self.cost_of, tokens))
        return len(tokens) * self.cost_of(max(tokens))

    def _packed_groups(self, lengths: Mapping[int, int]) -> list[list[int]]:
        numbers = list(lengths)
        tokens = [round_up(lengths[number], self.sequence_multiple) for number in numbers]
        per_replica = -(-fewest_groups(tokens, self._budget) // self.replicas)
        count = round_up(per_replica, self._count_multiple) * self.replicas
        costs = [self.cost_of(lengths[number]) for number in numbers]
        return [[numbers[i] for i in group] for group in balanced_groups(costs, tokens, self._budget, count)]

    def _padded_groups(self, lengths: Mapping[int, int]) -> list[list[int]]:
        """Similar lengths together, and nearly the same number of sequences in each."""
        per_replica = -(-len(lengths) // (self._size * self.replicas))
        count = round_up(per_replica, self._count_multiple) * self.replicas
        by_length = sorted(lengths, key=lambda number: -lengths[number])
        ends = [(index + 1) * len(by_length) // count for index in range(count)]
        groups = [by_length[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        if self._equal_shapes or self._equal_over_replicas:
            rows = max(map(len, groups))
            groups = [group + [PADDING] * (rows - len(group)) for group in groups]
        return groups

    def _with_rows(self, of_replica: Sequence[Sequence[tuple[int, ...]]], lengths: Mapping[int, int]) -> Schedule:
        """Give every micro-batch the length of its rows."""
        padded = {**lengths, PADDING: PADDING_LENGTH}

        def row_length(group: tuple[int, ...]) -> int:
            tokens = [padded[sequence] for sequence in group]
            if self.packed:
                tokens = [sum(round_up(length, self.sequence_multiple) for length in tokens)]
            return round_up(max(tokens), self.row_multiple)

        rows = [[row_length(group) for group in groups] for groups in of_replica]
        if self._equal_over_replicas:
            longest = max(map(max, rows))
            rows = [[longest] * len(of_one) for of_one in rows]
        elif self._equal_shapes:
            rows = [[max(of_one)] * len(of_one) for of_one in rows]
        return Schedule(
            tuple(
                tuple(PlannedMicroBatch(group, row) for group, row in zip(groups, of_one, strict=True))
                for groups, of_one in zip(of_replica, rows, strict=True)
            )
        )
