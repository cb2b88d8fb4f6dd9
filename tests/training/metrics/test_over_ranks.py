"""What ranks measured: told to all, with the slowest one named; shares of groups and of a GPU's best."""

from __future__ import annotations

import math

import pytest
import torch.distributed as dist

from megatron_dppo.models.flops import PolicyFlops
from megatron_dppo.rollout.engine import ServerLoad
from megatron_dppo.training.exchange import SampleReport
from megatron_dppo.training.metrics.over_ranks import RankMeasures, measures_of_all, time_metrics
from megatron_dppo.training.metrics.peak_flops import peak_of
from megatron_dppo.training.metrics.step import phase_metrics, rollout_metrics
from megatron_dppo.training.metrics.work_clock import WorkClock
from megatron_dppo.training.rollouts import Rollouts


def _measured() -> list[RankMeasures]:
    rank = dist.get_rank()
    return measures_of_all({"update": 1.0 + rank, **({"score": 0.5} if rank == 1 else {})})


def test_every_rank_learns_what_all_ranks_measured(ranks):
    first, second = ranks(2).run(_measured)
    assert first == second
    assert [of_rank.seconds for of_rank in first] == [{"update": 1.0}, {"update": 2.0, "score": 0.5}]
    assert all(of_rank.peak_bytes > 2**20 for of_rank in first)


def test_the_slowest_rank_is_named_and_a_mean_counts_those_that_took_part():
    measures = [RankMeasures({"update": 2.0}, 0), RankMeasures({"update": 5.0, "score": 1.0}, 0)]
    measures.append(RankMeasures({"update": 2.0, "score": 3.0}, 0))
    assert time_metrics(measures) == {
        "time/update_s": 5.0,
        "time/update_mean_s": 3.0,
        "time/update_slowest_rank": 1.0,
        "time/score_s": 3.0,
        "time/score_mean_s": 2.0,
        "time/score_slowest_rank": 2.0,
    }


def rollouts_of(*samples: tuple[int, float]) -> Rollouts:
    """Of (number, reward); prompts of 3 tokens, responses of 2."""
    reports = [SampleReport(number, 3, 2, reward, False, False, 1) for number, reward in samples]
    loads = {"http://a": ServerLoad(None, 20.0), "http://b": ServerLoad(7, 3.0)}
    return Rollouts(reports, {}, {}, 0, [], 0, None, False, loads, {})


def test_groups_of_equal_rewards_are_counted_among_the_prompts_that_have_answers():
    """Prompt 0: equal; prompt 1: not; prompt 2: one response left, which has no other to differ from."""
    rollouts = rollouts_of((0, 1.0), (1, 1.0), (2, 0.0), (3, 1.0), (5, 0.5))
    assert rollout_metrics(rollouts, 1, samples_per_prompt=2)["reward/equal_groups"] == pytest.approx(2 / 3)


def test_the_slowest_server_is_named():
    metrics = rollout_metrics(rollouts_of((0, 1.0)), 1, samples_per_prompt=1)
    assert metrics["rollout/servers"] == 2.0
    assert metrics["rollout/slowest_server"] == "http://b"
    assert metrics["rollout/server_queue_depth_max"] == 7.0
    assert (metrics["rollout/server_tokens_per_s_min"], metrics["rollout/server_tokens_per_s_max"]) == (3.0, 20.0)


def test_operations_per_second_are_those_of_the_trained_sequences():
    flops = PolicyFlops(per_token=10.0, per_pair=1.0)
    measures = [RankMeasures({"rollout": 1.0, "update": 2.0, "forward_backward": 1.0}, size) for size in (3, 7)]
    metrics = phase_metrics(rollouts_of((0, 1.0), (1, 0.0)), 20.0, measures, ("rollout", "update"), flops)
    of_sequence = 3 * (10 * 5 + 5 * 6 / 2)
    assert metrics["throughput/update_tflops_per_rank"] == pytest.approx(2 * of_sequence / 2.0 / 2 / 1e12)
    assert metrics["time/step_s"] == 3.0  # work within a phase does not count twice
    assert metrics["memory/peak_bytes"] == 7.0
    assert "throughput/update_mfu" not in metrics or math.isfinite(metrics["throughput/update_mfu"])


def test_gpus_are_known_by_their_names():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA H200") == 989e12
    assert peak_of("NVIDIA H20") == 148e12
    assert peak_of("NVIDIA GeForce RTX 4090") is None


def test_a_clock_adds_up_spans_and_forgets_them_when_asked():
    clock = WorkClock()
    clock.stop()  # nothing has begun
    assert clock.take_seconds() == 0.0
    for _ in range(2):
        clock.start()
        clock.stop()
    assert clock.take_seconds() > 0.0
    assert clock.take_seconds() == 0.0
