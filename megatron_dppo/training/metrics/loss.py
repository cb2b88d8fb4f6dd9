"""The loss's metrics of an update phase -> one number each, the same on every rank."""

from __future__ import annotations

import json

from megatron.core import parallel_state

from megatron_dppo.distributed.collectives import broadcast_bytes
from megatron_dppo.loss.metrics import MetricSums


def global_metrics(sums: MetricSums | None) -> dict[str, float]:
    """Over all data- and context-parallel ranks. Collective; ``sums`` is None but on the last pipeline stage."""
    final: dict[str, float] = {}
    if sums is not None:
        final = sums.all_reduce(parallel_state.get_data_parallel_group(with_context_parallel=True)).finalize()
    stages = parallel_state.get_pipeline_model_parallel_group()
    numbers: dict[str, float] = json.loads(
        broadcast_bytes(json.dumps(final).encode(), rank=stages.size() - 1, group=stages)
    )
    return numbers
