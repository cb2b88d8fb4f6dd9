"""Accuracy on held-out prompts: the same prompts and the same random seed every time it is measured."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core import parallel_state

from megatron_dppo.distributed.collectives import sum_over_ranks
from megatron_dppo.rollout.sample import Prompt, SamplingParams
from megatron_dppo.training.rollouts import RolloutPhase

# Verifiers give 1 to a right answer; some give partial credit below that, which does not count as right.
CORRECT = 1.0 - 1e-6


def evaluate(rollout_phase: RolloutPhase, prompts: Sequence[Prompt], sampling: SamplingParams) -> dict[str, float]:
    """Share of right answers and mean reward over all prompts, which are dealt out to the replicas. Collective."""
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    rollouts = rollout_phase.collect(prompts[replica::replicas], sampling)
    rewards = [float(sample.reward or 0.0) for sample in rollouts.samples]
    right, reward, count = sum_over_ranks(
        [sum(r >= CORRECT for r in rewards), sum(rewards), len(rewards)], group=parallel_state.get_data_parallel_group()
    )
    return {"eval/accuracy": right / count, "eval/reward_mean": reward / count}
