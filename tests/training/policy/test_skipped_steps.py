"""A step with a NaN gradient on one rank is skipped on all: the weights are those of a run that never made it."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_dppo import DPPOConfig
from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.training.config.schema import AdamConfig, AlgorithmConfig, Config, LoggingConfig, TrainConfig
from megatron_dppo.training.data.micro_batch import MicroBatch
from megatron_dppo.training.policy.dppo_step import DPPOStep
from megatron_dppo.training.policy.trainable import build_optimizer, wrap_for_training
from tests.example_sequences import examples, replica_batch
from tests.models.tiny_policies import tiny_hf_config
from tests.rank_pool import RankPools

LOSS = DPPOConfig(divergence="topk_kl", delta_low=1e-3, delta_high=1e-3)


class StepWithNaN(DPPOStep):
    """On replica 1 the hidden states of the optimizer steps in ``poisoned`` are NaN, and so are loss and gradient."""

    poisoned: tuple[int, ...] = ()

    def _loss_of(self, parts, batch, hidden, rollout_logits):
        step = min(batch.example_indices) % 2 if min(batch.example_indices) >= 0 else None
        if parallel_state.get_data_parallel_rank() == 1 and step in self.poisoned:
            hidden = hidden * float("nan")
        return super()._loss_of(parts, batch, hidden, rollout_logits)


def _train(
    poisoned: tuple[int, ...], only: int | None
) -> tuple[dict, dict[str, torch.Tensor], int, list[tuple[int, ...]]]:
    """On a rank: metrics, weights, steps skipped in a row and the examples of the evidence, after one rollout batch."""
    initialize_model_parallel(ParallelConfig(), seed=3)
    hf_config = tiny_hf_config("qwen3", num_hidden_layers=1)
    chunks = build_policy(hf_config, ParallelConfig(), torch.float32)
    initialize_randomly(chunks, seed=3)
    policy = wrap_for_training(chunks, hf_config, torch.float32)
    config = Config(
        algorithm=AlgorithmConfig(loss=LOSS),
        train=TrainConfig(updates_per_rollout=2, micro_batch_size=2),
        logging=LoggingConfig(improvement_bound=True),
    )
    evidence: list[MicroBatch] = []
    step = StepWithNaN(config, policy, build_optimizer(policy, AdamConfig(lr=1e-2), total_steps=2), evidence.extend)
    step.poisoned = poisoned
    batch = replica_batch(step, examples(), 2)
    if only is not None:
        batch = type(batch)([batch.steps[only]], batch.examples, batch.fields)
    metrics = step.run(batch)
    weights = {name: p.detach().clone() for chunk in chunks for name, p in chunk.named_parameters()}
    return metrics, weights, step.skipped_in_a_row, [batch.example_indices for batch in evidence]


def test_a_skipped_step_leaves_no_trace_in_weights_or_metrics(ranks: RankPools) -> None:
    for poisoned, kept in ((0, 1), (1, 0)):
        results, references = ranks(2).run(_train, (poisoned,), None), ranks(2).run(_train, (), kept)
        for (metrics, weights, in_a_row, _), (expected, reference, _, _) in zip(results, references, strict=True):
            assert metrics["train/skipped_steps"] == 1.0
            assert in_a_row == (1 if poisoned == 1 else 0)  # the last step ends a row, if it was applied
            assert all(torch.equal(weights[name], reference[name]) for name in reference)
            for name in ("loss", "grad_norm", "entropy", "lr", "bound/improvement"):
                assert metrics[name] == expected[name], name


def test_what_may_be_to_blame_is_kept_where_it_is(ranks: RankPools) -> None:
    (_, _, _, of_first), (_, _, _, of_second) = ranks(2).run(_train, (0,), None)
    assert of_first == []
    assert of_second
    assert all(number % 2 == 0 for indices in of_second for number in indices)


def test_steps_that_are_all_skipped_add_up(ranks: RankPools) -> None:
    for metrics, _, in_a_row, _ in ranks(2).run(_train, (0, 1), None):
        assert in_a_row == metrics["train/skipped_steps"] == 2
        assert not {"loss", "bound/improvement"} & metrics.keys()  # means over no tokens
