"""How a replica's examples become micro-batches: the same numbers however they are batched."""

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
from megatron_dppo.training.data.batcher import MicroBatcher, ReplicaBatch
from megatron_dppo.training.data.micro_batch import ExampleFields, MicroBatch, TrainingExample
from megatron_dppo.training.data.schedule import PADDING, PlannedMicroBatch, Scheduler
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
    return [TrainingExample(torch.randint(0, 250, (p + r,), generator=generator), p, advantage=1.0) for p, r in sizes]


def scheduler(**train: Any) -> Scheduler:
    return Scheduler(TrainConfig(**train), ParallelConfig(), replicas=1, cost_of=float)


def log_probs(policy: TrainablePolicy, examples: list[TrainingExample], **train: Any) -> torch.Tensor:
    """Of all responses, in order."""
    made = scheduler(**train)
    planned = made.schedule({n: len(e.token_ids) for n, e in enumerate(examples)}).replicas[0]
    batches = MicroBatcher(made).micro_batches(ReplicaBatch([planned], dict(enumerate(examples)), ExampleFields()), 0)

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


def _micro_batches_of_two_replicas() -> list[tuple[tuple[int, int], int, bool, tuple[int, ...] | None]]:
    """On a rank: (shape, tokens to learn from, has top-K, shape of the expert choices) of each micro-batch."""
    initialize_model_parallel(ParallelConfig(), seed=1)
    replica = parallel_state.get_data_parallel_rank()
    fields = ExampleFields(rollout_log_probs=True, topk=3, ref_log_probs=True, routed_experts=(2, 2))
    example = TrainingExample(
        torch.arange(5),
        prompt_length=2,
        rollout_log_probs=-torch.ones(3),
        topk_ids=torch.zeros(3, 3, dtype=torch.int32),
        topk_log_probs=-torch.ones(3, 3),
        ref_log_probs=-torch.ones(3),
        routed_experts=torch.tensor([0, 1], dtype=torch.uint8).expand(4, 2, 2),
    )
    made = scheduler(batching="packed")
    planned = made.schedule({0: 5}).replicas[0]
    batch = ReplicaBatch([planned if replica == 0 else [PlannedMicroBatch((PADDING,), 2)]], {0: example}, fields)
    return [
        (b.shape, len(b.rows), b.inputs.rollout_topk.ids.shape == (len(b.rows), 3), tuple(b.routed_experts.shape))
        for b in MicroBatcher(made).micro_batches(batch, 0)
    ]


def test_a_replica_without_examples_has_a_micro_batch_that_counts_for_nothing_with_the_same_fields(ranks):
    one, other = ranks(2).run(_micro_batches_of_two_replicas)
    assert one == [((1, 5), 3, True, (1, 5, 2, 2))]
    assert other == [((1, 2), 0, True, (1, 2, 2, 2))]
