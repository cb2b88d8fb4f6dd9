"""Which responses a run keeps, what of their tokens, and the distributions of all of them."""

from __future__ import annotations

import json

from megatron_dppo.training.metrics.sample_log import chosen_samples, distribution_record, sample_records
from megatron_dppo.training.metrics.token_record import POSITION_BINS, PROBABILITY_BINS, StepTokens
from tests.training.metrics.made_rollouts import made_rollouts, token_texts

REWARDS = [0.5, 0.2, 0.9, 0.1, 0.5, 1.0, 0.5, 0.3]


def test_the_worst_the_best_and_others_spread_over_the_batch_are_kept() -> None:
    assert chosen_samples(made_rollouts(REWARDS), 4) == {0: "spread", 2: "spread", 3: "worst", 5: "best"}
    assert chosen_samples(made_rollouts(REWARDS), 0) == {}
    assert chosen_samples(made_rollouts(REWARDS), 1) == {3: "worst"}
    assert len(chosen_samples(made_rollouts(REWARDS), 50)) == len(REWARDS)
    assert len(chosen_samples(made_rollouts([0.5]), 4)) == 1


def test_they_are_of_the_replica_whose_rank_writes() -> None:
    rollouts = made_rollouts(REWARDS, replicas=2)
    assert set(chosen_samples(rollouts, 8)) == {0, 2, 4, 6} == set(rollouts.own)


def test_a_token_that_was_left_out_of_the_loss_is_none_in_the_trace() -> None:
    rollouts = made_rollouts(REWARDS)
    tokens = StepTokens(traces={5: {0: [1.0, 0.1, -0.5, -0.4], 2: [0.0, 0.3, -2.0, -1.0]}})
    plain, traced = sample_records(7, rollouts.own, {3: "worst", 5: "best"}, tokens, token_texts)
    assert "trace" not in plain
    assert (plain["step"], plain["chosen"], plain["reward"], plain["tokens"]) == (7, "worst", 0.1, 4)
    assert traced["trace"] == {
        "text": ["t0 ", "t1 ", "t2 "],
        "weight": [1.0, None, 0.0],
        "divergence": [0.1, None, 0.3],
        "log_prob": [-0.5, None, -2.0],
        "rollout_log_prob": [-0.4, None, -1.0],
    }


def test_distributions_count_every_response_and_stay_short() -> None:
    tokens = StepTokens()
    tokens.by_position[1] = [4.0, 2.0, 0.4, 1.0]
    record = distribution_record(3, made_rollouts(REWARDS), tokens, longest=100_000)
    assert sum(record["reward"]["counts"]) == sum(record["length"]["counts"]) == len(REWARDS)
    assert record["reward"]["counts"][-1] == 1  # the reward of 1
    assert record["reward"]["counts"][10] == 3  # 0.5
    assert record["length"]["counts"][0] == len(REWARDS)
    assert record["position"] == {
        "lowest": [0, 1],
        "tokens": [0.0, 4.0],
        "masked": [0.0, 2.0],
        "divergence": [0.0, 0.4],
        "abs_log_ratio": [0.0, 1.0],
    }
    assert record["probability"]["lowest"] == list(PROBABILITY_BINS)
    assert POSITION_BINS[:5] == (0, 1, 2, 4, 8)
    assert len(json.dumps(record)) < 2000
