"""The loss's metrics of an update phase -> one number each, the same on every rank."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dppo.loss.metrics import MetricSums


def global_metrics(parts: MetricSums | None) -> dict[str, float]:
    """Over all data- and context-parallel ranks. Collective; ``parts`` is None but on the last pipeline stage."""
    box: list[Any] = [None]
    if parts is not None:
        box = [parts.all_reduce(parallel_state.get_data_parallel_group(with_context_parallel=True)).finalize()]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast_object_list(
            box,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return dict(box[0])
