"""The loss's metrics of an update phase -> one number each, the same on every rank."""

from __future__ import annotations

import json

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dppo.distributed.collectives import broadcast_bytes
from megatron_dppo.loss.improvement_bound import ResponseSums
from megatron_dppo.loss.metrics import MetricSums

_REWARD_RANGE = 1.0  # rewards lie in [0, 1]; a verifier that returns another has failed


def global_metrics(sums: MetricSums | None) -> dict[str, float]:
    """Over all data- and context-parallel ranks. Collective; ``sums`` is None but on the last pipeline stage."""
    return _of_last_stage({} if sums is None else sums.all_reduce(_ranks_with_other_tokens()).finalize())


def global_bound(sums: ResponseSums | None) -> dict[str, float]:
    """What the policy is worth by all responses of an optimizer step. As ``global_metrics``."""
    return _of_last_stage({} if sums is None else sums.all_reduce(_ranks_with_other_tokens()).finalize(_REWARD_RANGE))


def _ranks_with_other_tokens() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _of_last_stage(final: dict[str, float]) -> dict[str, float]:
    stages = parallel_state.get_pipeline_model_parallel_group()
    numbers: dict[str, float] = json.loads(
        broadcast_bytes(json.dumps(final).encode(), rank=stages.size() - 1, group=stages)
    )
    return numbers
