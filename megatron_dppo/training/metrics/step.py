"""What a training step reports beside the loss: rewards, lengths, staleness, times, throughput, memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from megatron.core import parallel_state

from megatron_dppo.distributed.collectives import sum_over_ranks
from megatron_dppo.models.flops import PolicyFlops
from megatron_dppo.rollout.engine import ServerLoad
from megatron_dppo.training.data.micro_batch import MicroBatch
from megatron_dppo.training.metrics.over_ranks import RankMeasures, time_metrics
from megatron_dppo.training.metrics.peak_flops import peak_flops
from megatron_dppo.training.rollouts import Rollouts


def rollout_metrics(rollouts: Rollouts, weight_version: int, samples_per_prompt: int) -> dict[str, float | str]:
    """Rewards, lengths and staleness over all replicas.

    Args:
        rollouts: the step's samples.
        weight_version: the newest there was when they were drawn; staleness counts versions behind it.
        samples_per_prompt: which samples answer the same prompt.
    """
    reports, count = rollouts.reports, len(rollouts.reports)
    mean = sum(report.reward for report in reports) / count
    variance = sum(report.reward**2 for report in reports) / count - mean**2
    return {
        "reward/mean": mean,
        "reward/std": max(variance, 0.0) ** 0.5,
        "reward/equal_groups": _share_of_equal_groups(rollouts, samples_per_prompt),
        "reward/scoring_failures": float(rollouts.scoring_failures),
        "rollout/length_mean": sum(report.response_tokens for report in reports) / count,
        "rollout/cut_fraction": sum(report.was_cut for report in reports) / count,
        "rollout/aborted": float(sum(report.was_aborted for report in reports)),
        "rollout/failed": float(rollouts.failed),
        "rollout/faulty_tokens": float(sum(report.faulty_tokens for report in reports)),
        "rollout/staleness_max": float(weight_version - min(report.oldest_weight_version for report in reports)),
        **_server_metrics(rollouts.server_loads),
    }


def _server_metrics(loads: Mapping[str, ServerLoad]) -> dict[str, float | str]:
    """Nothing without servers."""
    if not loads:
        return {}
    slowest = min(loads, key=lambda url: loads[url].tokens_per_s)
    depths = [load.queue_depth_max for load in loads.values() if load.queue_depth_max is not None]
    return {
        "rollout/servers": float(len(loads)),
        **({"rollout/server_queue_depth_max": float(max(depths))} if depths else {}),
        "rollout/server_tokens_per_s_max": max(load.tokens_per_s for load in loads.values()),
        "rollout/server_tokens_per_s_min": loads[slowest].tokens_per_s,
        "rollout/slowest_server": slowest,
    }


def _share_of_equal_groups(rollouts: Rollouts, samples_per_prompt: int) -> float:
    """Of the prompts that were answered: the share whose responses all have the same reward, and so no advantage."""
    rewards: dict[int, set[float]] = {}
    for report in rollouts.reports:
        rewards.setdefault(report.number // samples_per_prompt, set()).add(report.reward)
    return sum(len(different) == 1 for different in rewards.values()) / len(rewards)


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


def phase_metrics(
    rollouts: Rollouts,
    computed_tokens: float,
    measures: Sequence[RankMeasures],
    phases: Collection[str],
    flops: PolicyFlops,
) -> dict[str, float]:
    """Seconds of each phase, throughput over all replicas, use of the GPUs, peak memory.

    Args:
        rollouts: the step's samples.
        computed_tokens: of the step's forward-backward passes, padding included.
        measures: of all ranks.
        phases: those that follow each other; the other times are of work within them.
        flops: of the policy.
    """
    generated = float(sum(report.response_tokens for report in rollouts.reports))
    trained = generated + sum(report.prompt_tokens for report in rollouts.reports)
    times = time_metrics(measures)
    step_seconds = sum(times[f"time/{phase}_s"] for phase in phases)
    operations = sum(flops.training(report.prompt_tokens + report.response_tokens) for report in rollouts.reports)
    per_rank = operations / times["time/update_s"] / len(measures)
    peak = peak_flops()
    return {
        **times,
        "time/step_s": step_seconds,
        "throughput/tokens_per_s": trained / step_seconds,
        "throughput/rollout_tokens_per_s": generated / times["time/rollout_s"],
        "throughput/update_tokens_per_s": trained / times["time/update_s"],
        "throughput/update_computed_tokens_per_s": computed_tokens / times["time/update_s"],
        "throughput/update_tflops_per_rank": per_rank / 1e12,
        **({} if peak is None else {"throughput/update_mfu": per_rank / peak}),
        "memory/peak_bytes": float(max(of_rank.peak_bytes for of_rank in measures)),
    }
