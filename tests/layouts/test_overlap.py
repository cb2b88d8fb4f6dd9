"""Messages that overlap computation carry the same numbers: weights after several optimizer steps are the same to the bit."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.training.config.schema import AdamConfig, AlgorithmConfig, Config, TrainConfig
from megatron_dppo.training.data.batcher import ReplicaBatch
from megatron_dppo.training.metrics.work_clock import WorkClock
from megatron_dppo.training.policy.dppo_step import DPPOStep
from megatron_dppo.training.policy.trainable import build_optimizer, wrap_for_training
from tests.example_sequences import examples, replica_batch
from tests.models.tiny_policies import tiny_hf_config
from tests.rank_pool import RankPools

SHARDED = {"use_distributed_optimizer": True}
REDUCE = {"overlap_grad_reduce": True, "bucket_size": 2000}  # of some 40,000 parameters
GATHER = {**REDUCE, **SHARDED, "overlap_param_gather": True}
# In proportion to the gradient, whose norm, added up in the order of the shards, does not matter.
GRADIENT_DESCENT = AdamConfig(lr=1e3, adam_eps=1e3, clip_grad=0.0)


@dataclasses.dataclass
class _Run:
    """What a rank saw: its weights and optimizer steps, and when which messages began."""

    weights: dict[str, torch.Tensor]
    grad_norms: list[float]
    buckets: int
    micro_batches: set[int]  # of the optimizer steps
    reduced_early: int  # buckets whose reduction began before the last backward pass had ended
    gathered_early: int  # buckets that were gathered from within a forward pass


class _Clock(WorkClock):
    """Knows whether the schedule of forward and backward passes runs."""

    running = False

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False


def _own_part(batch: ReplicaBatch) -> ReplicaBatch:
    """With the examples of this replica alone, as a run hands them over: others have no reference log-probs here."""
    numbers = {number for planned in batch.steps for micro_batch in planned for number in micro_batch.sequences}
    own = {number: example for number, example in batch.examples.items() if number in numbers}
    return dataclasses.replace(batch, examples=own)


def _trained(policy_kind: str, layout: dict[str, Any], train: dict[str, Any], loss: dict[str, Any], few: bool) -> _Run:
    """Two rollout batches of two optimizer steps each."""
    parallel = ParallelConfig(**layout)
    initialize_model_parallel(parallel, seed=3)
    hf_config = tiny_hf_config(policy_kind, num_hidden_layers=4)
    chunks = build_policy(hf_config, parallel, torch.float32)
    initialize_randomly(chunks, seed=3)
    policy = wrap_for_training(chunks, hf_config, torch.float32, parallel)
    policy.forward_backward = clock = _Clock()
    config = Config(
        parallel=parallel,
        algorithm=AlgorithmConfig(loss=DPPOConfig(**loss), max_mismatch=0.0),
        train=TrainConfig(updates_per_rollout=2, micro_batch_size=1, tokens_per_micro_batch=24, **train),
    )
    step = DPPOStep(config, policy, build_optimizer(policy, GRADIENT_DESCENT, total_steps=4))
    reduced_early, gathered_early, micro_batches, norms = 0, 0, set(), []
    start_reduction, start_gathering = (
        _ParamAndGradBucketGroup.start_grad_sync,
        _ParamAndGradBucketGroup.start_param_sync,
    )

    def reduction(group: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal reduced_early
        reduced_early += clock.running
        start_reduction(group, *args, **kwargs)

    def gathering(group: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal gathered_early
        gathered_early += clock.running
        start_gathering(group, *args, **kwargs)

    batches = (examples()[:3], examples()[:3]) if few else (examples(), examples()[:4])
    with (
        mock.patch.object(_ParamAndGradBucketGroup, "start_grad_sync", reduction),
        mock.patch.object(_ParamAndGradBucketGroup, "start_param_sync", gathering),
    ):
        for batch in batches:
            own = _own_part(replica_batch(step, batch, 2))
            micro_batches.update(map(len, own.steps))
            norms.append(step.run(own)["grad_norm"])
    weights = {
        f"{index}.{name}": parameter.detach().clone()
        for index, chunk in enumerate(policy.chunks)
        for name, parameter in chunk.named_parameters()
    }
    buckets = sum(len(c.bucket_groups) + len(c.expert_parallel_bucket_groups) for c in policy.chunks)
    return _Run(weights, norms, buckets, micro_batches, reduced_early, gathered_early)


TOPK = {"divergence": "topk_kl"}
PENALTY = {"divergence": "binary_tv", "kl_coef": 0.1, "entropy_coef": 0.01}  # the reference policy's weights in place
EXACT = {"divergence": "exact_tv"}  # and the rollout policy's


# Nightly: once, in some twenty runs of the fourth case, malloc found its memory corrupt on one rank (dev/LOG.md).
@pytest.mark.parametrize(
    ("policy_kind", "world_size", "layout", "overlap", "train", "loss", "few"),
    [
        ("qwen3", 2, {}, REDUCE, {"batching": "packed"}, TOPK, False),
        ("qwen3_tied", 2, SHARDED, GATHER, {"batching": "packed", "fused_linear": True}, TOPK, False),
        ("qwen3", 2, SHARDED, GATHER, {}, EXACT, True),  # the second replica has only what fills a slot
        pytest.param("qwen3_moe", 2, SHARDED, GATHER, {"batching": "packed"}, PENALTY, False, marks=pytest.mark.nightly),
        pytest.param(
            "qwen3_moe", 4,
            {**SHARDED, "expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}, GATHER,
            {"batching": "packed", "fused_linear": True}, TOPK, False, marks=pytest.mark.nightly,
        ),
        pytest.param(
            "qwen3_tied", 4, {**SHARDED, "pipeline_model_parallel_size": 2}, GATHER, {"batching": "packed"}, TOPK, False,
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            "qwen3", 4,
            {**SHARDED, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, GATHER,
            {}, TOPK, False, marks=pytest.mark.nightly,
        ),
    ],
)  # fmt: skip
def test_overlapped_messages_change_no_number(
    policy_kind: str,
    world_size: int,
    layout: dict[str, Any],
    overlap: dict[str, Any],
    train: dict[str, Any],
    loss: dict[str, Any],
    few: bool,
    ranks: RankPools,
) -> None:
    """Two replicas: a sum of two numbers does not depend on the bucket that they are in."""
    plain = ranks(world_size).run(_trained, policy_kind, layout, train, loss, few)
    overlapped = ranks(world_size).run(_trained, policy_kind, {**layout, **overlap}, train, loss, few)
    for got, expected in zip(overlapped, plain, strict=True):
        # Squares of up to 16384 elements, added in fp32 in another order: some sqrt(16384) roundings of 6e-8.
        assert got.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
        for name, weight in expected.weights.items():
            assert torch.equal(got.weights[name], weight), name
    first = overlapped[0]  # the first pipeline stage: core makes no buckets on others
    assert first.buckets > 4
    # All micro-batches but the last only add up; were they counted, core would expect as many in every step. A pipeline has
    # multiples of its stages.
    assert few or "pipeline_model_parallel_size" in layout or len(first.micro_batches) > 1
    # Not in the first step of all, which finds out which gradients come; in the three after it.
    assert first.reduced_early >= 3 * (first.buckets - 1)
    assert plain[0].reduced_early == plain[0].gathered_early == 0
    if "overlap_param_gather" in overlap:
        assert first.gathered_early >= first.buckets
