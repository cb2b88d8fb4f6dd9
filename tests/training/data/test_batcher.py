"""How a step's examples become micro-batches: same numbers however they are batched, same count on all replicas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.training.config.schema import TrainConfig
from megatron_dppo.training.data.batcher import MicroBatcher
from megatron_dppo.training.data.micro_batch import PADDING, MicroBatch, TrainingExample
from megatron_dppo.training.policy.head_outputs import response_log_probs
from megatron_dppo.training.policy.optimizer_step import forward_only
from megatron_dppo.training.policy.trainable import TrainablePolicy, wrap_for_training
from tests.models.tiny_policies import tiny_hf_config

pytestmark = pytest.mark.slow

PACKED = {"batching": "packed", "tokens_per_micro_batch": 48}
some_sizes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 24)), min_size=1, max_size=9)


def examples_of(sizes: list[tuple[int, int]]) -> list[TrainingExample]:
    """(prompt, response) tokens each; no two sequences alike."""
    generator = torch.Generator().manual_seed(len(sizes))
    return [
        TrainingExample(torch.randint(0, 250, (p + r,), generator=generator).tolist(), p, advantage=1.0)
        for p, r in sizes
    ]


def batcher(parallel: ParallelConfig, **train: Any) -> MicroBatcher:
    return MicroBatcher(TrainConfig(**train), parallel)


def log_probs(policy: TrainablePolicy, examples: list[TrainingExample], **train: Any) -> torch.Tensor:
    """Of all responses, in order."""
    batches = batcher(ParallelConfig(), **train).micro_batches(examples)

    def consume(batch: MicroBatch, hidden: torch.Tensor) -> torch.Tensor:
        return response_log_probs(policy, TrainConfig(**train), batch, hidden)

    found: dict[int, torch.Tensor] = {}
    for batch, whole in zip(batches, forward_only(policy, batches, consume), strict=True):
        for index, (row, start) in zip(batch.example_indices, batch.layout.places, strict=True):
            found[index] = whole[row, start:][examples[index].response_slice]
    return torch.cat([found[index] for index in range(len(examples))])


def _compare_padded_and_packed(kind: str) -> None:
    initialize_model_parallel(ParallelConfig(), seed=3)
    # Weights five times larger than usual: attention looks at something, so what must not be seen would show.
    hf_config = tiny_hf_config(kind, initializer_range=0.1)
    chunks = build_policy(hf_config, ParallelConfig(), torch.float32)
    initialize_randomly(chunks, seed=3)
    policy = wrap_for_training(chunks, hf_config, torch.float32)

    @settings(max_examples=20)
    @given(some_sizes)
    def compare(sizes: list[tuple[int, int]]) -> None:
        examples = examples_of(sizes)
        alone = log_probs(policy, examples, batching="padded", micro_batch_size=1)
        for train in ({"batching": "padded", "micro_batch_size": 4}, PACKED):
            # fp32 resolves log-probs of 4 to 8 to 5e-7, and two are subtracted; rounding in the layers adds less.
            torch.testing.assert_close(log_probs(policy, examples, **train), alone, rtol=1e-6, atol=1e-6)

    compare()


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_log_probs_do_not_depend_on_batching(ranks, kind):
    ranks(1).run(_compare_padded_and_packed, kind)


def _micro_batches(layout: dict[str, Any], train: dict[str, Any], sizes: list[list[tuple[int, int]]]) -> list[tuple]:
    """On a rank: (shape, examples, tokens to learn from) of each micro-batch."""
    parallel = ParallelConfig(**layout)
    initialize_model_parallel(parallel, seed=1)
    mine = sizes[parallel_state.get_data_parallel_rank()]
    made = batcher(parallel, **train).micro_batches(examples_of(mine))
    return [(batch.shape, batch.example_indices, len(batch.rows)) for batch in made]


SHORT, LONG = [(2, 2), (2, 3)], [(10, 30), (12, 28), (4, 20), (3, 5)]


def test_a_replica_with_less_work_fills_up_with_micro_batches_that_count_for_nothing(ranks):
    little, much = ranks(2).run(_micro_batches, {}, PACKED, [SHORT, LONG])
    assert [indices for _, indices, _ in little] == [(1,), (0,), (PADDING,)]
    assert [learnt for _, _, learnt in little] == [3, 2, 0]
    assert [shape for shape, _, _ in much] == [(1, 40), (1, 40), (1, 32)]
    assert [shape for shape, _, _ in little] == [(1, 5), (1, 4), (1, 4)]


def test_replicas_whose_experts_gather_all_tokens_have_equal_shapes(ranks):
    layout = {"expert_model_parallel_size": 2, "moe_token_dispatcher": "allgather"}
    for train in (PACKED, {"batching": "padded", "micro_batch_size": 2}):
        little, much = ranks(2).run(_micro_batches, layout, train, [[*SHORT, *SHORT], LONG])
        assert [shape for shape, _, _ in little] == [shape for shape, _, _ in much]


@pytest.mark.parametrize("chunks", [None, 2])
def test_a_pipeline_has_equal_shapes_and_if_interleaved_whole_rounds(ranks, chunks):
    layout = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": chunks}
    first, last = ranks(2).run(_micro_batches, layout, PACKED, [LONG])
    assert first == last
    assert len({shape for shape, _, _ in first}) == 1
    assert len(first) == (4 if chunks else 3)
    assert sum(learnt for _, _, learnt in first) == sum(response for _, response in LONG)


@pytest.mark.parametrize(
    ("layout", "packed", "padded"),
    [  # three sequences of 7, 11 and 2 tokens -> (rows, length) on one rank
        ({}, (1, 20), (3, 11)),
        ({"tensor_model_parallel_size": 2}, (1, 20), (3, 12)),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": False}, (1, 20), (3, 11)),
        ({"context_parallel_size": 2}, (1, (8 + 12 + 4) // 2), (3, 12 // 2)),
    ],
)
def test_padding_is_no_more_than_what_ranks_that_split_tokens_need(ranks, layout, packed, padded):
    sizes = [(3, 4), (5, 6), (1, 1)]
    for train, shape in ((PACKED, packed), ({"batching": "padded", "micro_batch_size": 3}, padded)):
        for ((found, _, _),) in ranks(2 if layout else 1).run(_micro_batches, layout, train, [sizes]):
            assert found == shape
