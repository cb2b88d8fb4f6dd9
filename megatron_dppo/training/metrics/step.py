"""What a training step reports beside the loss: rewards, lengths, staleness, times, throughput, memory."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence

import torch
from megatron.core import parallel_state

from megatron_dppo.distributed.collectives import sum_over_ranks
from megatron_dppo.training.data.micro_batch import MicroBatch
from megatron_dppo.training.rollouts import Rollouts


def rollout_metrics(rollouts: Rollouts, weight_version: int) -> dict[str, float]:
    """Rewards, lengths and staleness over all replicas.

    ``weight_version`` is the newest there was when the step's samples were drawn; staleness counts versions behind it.
    """
    reports, count = rollouts.reports, len(rollouts.reports)
    mean = sum(report.reward for report in reports) / count
    variance = sum(report.reward**2 for report in reports) / count - mean**2
    return {
        "reward/mean": mean,
        "reward/std": max(variance, 0.0) ** 0.5,
        "reward/scoring_failures": float(rollouts.scoring_failures),
        "rollout/length_mean": sum(report.response_tokens for report in reports) / count,
        "rollout/cut_fraction": sum(report.was_cut for report in reports) / count,
        "rollout/aborted": float(sum(report.was_aborted for report in reports)),
        "rollout/failed": float(rollouts.failed),
        "rollout/faulty_tokens": float(sum(report.faulty_tokens for report in reports)),
        "rollout/staleness_max": float(weight_version - min(report.oldest_weight_version for report in reports)),
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


def phase_metrics(rollouts: Rollouts, computed_tokens: float, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase, tokens per second over all replicas, peak memory of this rank.

    ``computed_tokens`` are those of the step's forward-backward passes, padding included.
    """
    generated = float(sum(report.response_tokens for report in rollouts.reports))
    trained = generated + sum(report.prompt_tokens for report in rollouts.reports)
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
