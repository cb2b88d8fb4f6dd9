"""What a training step reports beside the loss: rewards, lengths, staleness, times, throughput, memory."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence

import torch
from megatron.core import parallel_state

from megatron_dppo.distributed.collectives import max_over_ranks, sum_over_ranks
from megatron_dppo.training.data.micro_batch import MicroBatch
from megatron_dppo.training.rollouts import ScoredRollouts


def rollout_metrics(rollouts: ScoredRollouts, weight_version: int) -> dict[str, float]:
    """Rewards, lengths and staleness over all replicas. Collective.

    ``weight_version`` is the newest there was when the step's samples were drawn; staleness counts versions behind it.
    """
    samples, replicas = rollouts.samples, parallel_state.get_data_parallel_group()
    rewards = [float(sample.reward or 0.0) for sample in samples]
    sums = [
        float(len(samples)),
        sum(rewards),
        sum(reward**2 for reward in rewards),
        float(sum(len(sample.response_ids) for sample in samples)),
        float(sum(sample.finish_reason == "length" for sample in samples)),
        float(sum(sample.finish_reason == "abort" for sample in samples)),
        float(rollouts.scoring_failures),
    ]
    count, reward, reward_squared, tokens, cut, aborted, failures = sum_over_ranks(sums, group=replicas)
    staleness = max(weight_version - sample.oldest_weight_version for sample in samples)
    mean = reward / count
    return {
        "reward/mean": mean,
        "reward/std": max(reward_squared / count - mean**2, 0.0) ** 0.5,
        "reward/scoring_failures": failures,
        "rollout/length_mean": tokens / count,
        "rollout/cut_fraction": cut / count,
        "rollout/aborted": aborted,
        "rollout/staleness_max": max_over_ranks([staleness], group=replicas)[0],
    }


class BatchMetrics:
    """Counts what the micro-batches of a training step hold and what they cost to compute."""

    def __init__(self) -> None:
        self._micro_batches = 0
        self._computed = 0
        self._padding = 0

    def add(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Take in the micro-batches of an optimizer step."""
        self._micro_batches += len(micro_batches)
        self._computed += sum(batch.tokens.numel() for batch in micro_batches)
        self._padding += sum(batch.num_padding for batch in micro_batches)

    def reduce(self) -> dict[str, float]:
        """Over all data- and context-parallel ranks. Collective."""
        computed, padding = sum_over_ranks(
            [self._computed, self._padding],
            group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        return {
            "batch/micro_batches": float(self._micro_batches),
            "batch/computed_tokens": computed,
            "batch/padding_share": padding / computed,
        }


def phase_metrics(rollouts: ScoredRollouts, computed_tokens: float, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase, tokens per second over all replicas, peak memory of this rank. Collective.

    ``computed_tokens`` are those of the step's forward-backward passes, padding included.
    """
    generated = float(sum(len(sample.response_ids) for sample in rollouts.samples))
    trained = float(sum(len(sample.token_ids) for sample in rollouts.samples))
    generated, trained = sum_over_ranks([generated, trained], group=parallel_state.get_data_parallel_group())
    step_seconds = sum(seconds.values())
    return {
        **{f"time/{phase}_s": duration for phase, duration in seconds.items()},
        "time/step_s": step_seconds,
        "throughput/tokens_per_s": trained / step_seconds,
        "throughput/rollout_tokens_per_s": generated / seconds["rollout"],
        "throughput/update_tokens_per_s": trained / seconds["update"],
        "throughput/update_computed_tokens_per_s": computed_tokens / seconds["update"],
        "memory/peak_bytes": float(peak_memory_bytes()),
    }


def peak_memory_bytes() -> int:
    """Most memory held so far: allocated on this rank's GPU, or the resident set of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
