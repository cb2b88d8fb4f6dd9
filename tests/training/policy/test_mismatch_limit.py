"""Rollouts that the policy did not draw, in whatever way that came about, are found before anything is learned from them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.errors import MismatchError
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.training.config.schema import AdamConfig, AlgorithmConfig, Config, TrainConfig
from megatron_dppo.training.policy.dppo_step import DPPOStep
from megatron_dppo.training.policy.trainable import build_optimizer, wrap_for_training
from tests.example_sequences import examples, replica_batch
from tests.models.tiny_policies import tiny_hf_config
from tests.rank_pool import RankPools


def _learn(layout: dict[str, int], off_by: float, limit: float) -> tuple[str, bool, float]:
    """(the error, whether the weights are as they were, the mismatch that was measured), of one rollout batch."""
    parallel = ParallelConfig(**layout)
    initialize_model_parallel(parallel, seed=3)
    hf_config = tiny_hf_config("qwen3", num_hidden_layers=2)
    chunks = build_policy(hf_config, parallel, torch.float32)
    initialize_randomly(chunks, seed=3)
    policy = wrap_for_training(chunks, hf_config, torch.float32)
    config = Config(
        algorithm=AlgorithmConfig(max_mismatch=limit),
        parallel=parallel,
        train=TrainConfig(updates_per_rollout=2, micro_batch_size=2),
    )
    step = DPPOStep(config, policy, build_optimizer(policy, AdamConfig(lr=1e-2), total_steps=2))
    batch = replica_batch(step, examples(), 2)
    own = step._response_log_probs(batch)
    drawn = {
        n: dataclasses.replace(e, rollout_log_probs=own[n] - off_by) for n, e in batch.examples.items() if n in own
    }
    before = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    error, mismatch = "", float("nan")
    try:
        mismatch = step.run(dataclasses.replace(batch, examples=batch.examples | drawn))["mismatch/abs_log_ratio"]
    except MismatchError as raised:
        error = str(raised)
    after = [parameter for chunk in chunks for parameter in chunk.parameters()]
    return error, all(map(torch.equal, before, after)), mismatch


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=["DP2", "PP2"])
def test_rollouts_of_another_distribution_are_refused_on_every_rank(ranks: RankPools, layout: dict[str, int]) -> None:
    results = ranks(2).run(_learn, layout, 0.3, 0.2)
    assert all(unchanged for _, unchanged, _ in results)
    (message,) = {error for error, _, _ in results}
    assert "is 0.3, more than algorithm.max_mismatch = 0.2" in message


@pytest.mark.parametrize("limit", [0.4, 0.0], ids=["within", "none"])
def test_rollouts_within_the_limit_are_learned_from(ranks: RankPools, limit: float) -> None:
    for error, unchanged, mismatch in ranks(2).run(_learn, {}, 0.3, limit):
        assert (error, unchanged) == ("", False)
        assert mismatch == pytest.approx(0.3, abs=1e-5)
