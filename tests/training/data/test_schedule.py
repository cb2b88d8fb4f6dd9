"""Who computes what in an optimizer step: everything once, as many micro-batches everywhere, and nobody waits for long."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo.distributed.layout import ParallelConfig
from megatron_dppo.training.config.schema import TrainConfig
from megatron_dppo.training.data.schedule import PADDING, Schedule, Scheduler

PACKED = {"batching": "packed", "tokens_per_micro_batch": 48}
PADDED = {"batching": "padded", "micro_batch_size": 2}
some_lengths = st.lists(st.integers(2, 48), min_size=1, max_size=30)


def scheduler(replicas: int, train: dict[str, Any], **layout: Any) -> Scheduler:
    return Scheduler(TrainConfig(**train), ParallelConfig(**layout), replicas, lambda length: length + length**2 / 50)


def shapes(schedule: Schedule) -> list[list[tuple[int, int]]]:
    """(sequences, row length) of each micro-batch of each replica."""
    return [[(len(one.sequences), one.row_length) for one in replica] for replica in schedule.replicas]


@settings(max_examples=60)
@given(
    some_lengths,
    st.integers(1, 5),
    st.sampled_from([PACKED, PADDED]),
    st.sampled_from(
        [
            {},
            {"tensor_model_parallel_size": 4},
            {"context_parallel_size": 2},
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            {"expert_model_parallel_size": 2, "moe_token_dispatcher": "allgather"},
        ]
    ),
)
def test_every_sequence_is_learned_from_once_in_as_many_micro_batches_everywhere(lengths, replicas, train, layout):
    numbered = {7 * index: length for index, length in enumerate(lengths)}
    schedule = scheduler(replicas, train, **layout).schedule(numbered)
    assert len(schedule.replicas) == replicas
    assert len({len(replica) for replica in schedule.replicas}) == 1
    learned = [n for replica in schedule.replicas for one in replica for n in one.sequences if n != PADDING]
    assert sorted(learned) == sorted(numbered)
    assert schedule.owners().keys() == numbered.keys()
    multiple = 4 if layout.get("context_parallel_size") or layout.get("tensor_model_parallel_size") else 1
    for replica in schedule.replicas:
        for one in replica:
            assert one.sequences
            assert one.row_length % multiple == 0
            held = [numbered.get(n, 2) for n in one.sequences]
            assert one.row_length >= (sum(held) if train is PACKED else max(held))


@settings(max_examples=40)
@given(some_lengths, st.integers(1, 4), st.sampled_from([PACKED, PADDED]))
def test_the_schedule_depends_on_lengths_only_and_never_runs_more_micro_batches_than_needed(lengths, replicas, train):
    numbered = dict(enumerate(lengths))
    schedule = scheduler(replicas, train).schedule(numbered)
    assert schedule == scheduler(replicas, train).schedule(dict(reversed(numbered.items())) | numbered)
    alone = scheduler(1, train).schedule(numbered).replicas[0]
    assert len(schedule.replicas[0]) == -(-len(alone) // replicas)


def test_the_optimizer_steps_are_the_same_in_every_layout_and_see_every_prompt():
    lengths = {number: 3 + number for number in range(16)}  # 4 prompts of 4 samples each
    of_layout = [
        [sorted(schedule.owners()) for schedule in scheduler(replicas, train).schedules(lengths, steps=2)]
        for replicas, train in ((1, PADDED), (3, PACKED), (16, PACKED))
    ]
    assert of_layout[0] == of_layout[1] == of_layout[2] == [list(range(0, 16, 2)), list(range(1, 16, 2))]
    assert len(scheduler(2, PACKED).schedules({3: 5}, steps=2)) == 1  # there is nothing for a second one


def test_replicas_get_the_same_work_however_uneven_the_sequences_are():
    lengths = dict(enumerate([40, 3, 3, 3, 5, 6, 30, 12, 12, 12, 8, 8, 9, 20, 25, 31]))
    made = scheduler(4, {**PACKED, "tokens_per_micro_batch": 80})
    assert made.efficiency(made.schedule(lengths), lengths, coupled=False) > 0.9
    assert made.efficiency(made.schedule(lengths), lengths, coupled=True) > 0.85
    one_by_one = Schedule(tuple(made.schedule({n: lengths[n]}).replicas[0] for n in (0, 1, 4, 6)))
    assert made.efficiency(one_by_one, lengths, coupled=False) == pytest.approx((72 + 3.18 + 5.5 + 48) / 4 / 72)


def test_fewer_sequences_than_replicas_leave_some_with_micro_batches_that_count_for_nothing():
    for train in (PACKED, PADDED):
        schedule = scheduler(3, train).schedule({4: 10, 9: 12})
        assert sorted(one.sequences for (one,) in schedule.replicas) == [(PADDING,), (4,), (9,)]


def test_replicas_whose_experts_gather_all_tokens_have_equal_shapes():
    lengths = dict(enumerate([40, 38, 20, 8, 4, 4, 5]))
    for train in (PACKED, PADDED):
        schedule = scheduler(2, train, expert_model_parallel_size=2, moe_token_dispatcher="allgather").schedule(lengths)
        first, second = shapes(schedule)
        rows = [[row for _, row in first], [row for _, row in second]]
        assert len({row for of_one in rows for row in of_one}) == 1
        if train is PADDED:
            assert first == second


@pytest.mark.parametrize("chunks", [None, 2])
def test_a_pipeline_has_equal_shapes_and_if_interleaved_whole_rounds(chunks):
    layout = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": chunks}
    for train in (PACKED, PADDED):
        (made,) = shapes(scheduler(1, train, **layout).schedule(dict(enumerate([40, 40, 24, 8, 5]))))
        assert len(made) == (4 if chunks else 3)
        assert len({row for _, row in made}) == 1
        if train is PADDED:
            assert len({sequences for sequences, _ in made}) == 1


@pytest.mark.parametrize(
    ("layout", "packed", "padded"),
    [  # three sequences of 7, 11 and 2 tokens -> row length over all context-parallel ranks
        ({}, 20, 11),
        ({"tensor_model_parallel_size": 2}, 20, 12),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": False}, 20, 11),
        ({"context_parallel_size": 2}, 8 + 12 + 4, 12),
    ],
)
def test_rows_are_no_longer_than_what_ranks_that_split_tokens_need(layout, packed, padded):
    for train, expected in ((PACKED, packed), ({"batching": "padded", "micro_batch_size": 3}, padded)):
        ((found,),) = shapes(scheduler(1, train, **layout).schedule({0: 7, 1: 11, 2: 2}))
        assert found == (3, expected)
