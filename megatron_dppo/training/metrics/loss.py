"""Loss metrics of many micro-batches, updates and ranks -> one number each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dppo.loss.dppo_loss import LossOutput
from megatron_dppo.loss.metrics import finalize_metrics


class LossMetrics:
    """Adds up what the loss reports on the last pipeline stage; ``reduce`` makes it global."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._extrema: dict[str, torch.Tensor] = {}
        self._histogram: torch.Tensor | None = None
        self._backends: set[str] = set()

    def add(self, output: LossOutput) -> None:
        """Take in one micro-batch."""
        parts = {**output.metrics, "loss": (output.loss.detach(), output.num_tokens)}
        for name, (numerator, denominator) in parts.items():
            pair = torch.stack([torch.as_tensor(numerator).double(), torch.as_tensor(denominator).double()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair
        for name, value in output.extrema.items():
            value = value.detach().double()
            self._extrema[name] = torch.maximum(self._extrema[name], value) if name in self._extrema else value
        histogram = output.divergence_histogram
        self._histogram = histogram if self._histogram is None else self._histogram + histogram
        self._backends.add(output.backend)

    def reduce(self) -> dict[str, float | str]:
        """The metrics over all data- and context-parallel ranks, on every rank. Collective.

        ``backend`` names the kernels that computed them, on the ranks of this replica's last stage.
        """
        box: list[Any] = [self._reduce_over_replicas() if parallel_state.is_pipeline_last_stage() else None]
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            dist.broadcast_object_list(
                box,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return dict(box[0])

    def _reduce_over_replicas(self) -> dict[str, float | str]:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        sums = torch.stack(list(self._sums.values()))
        extrema = torch.stack(list(self._extrema.values()))
        histogram = self._histogram
        assert histogram is not None
        dist.all_reduce(sums, group=group)
        dist.all_reduce(extrema, op=dist.ReduceOp.MAX, group=group)
        dist.all_reduce(histogram, group=group)
        final = finalize_metrics(
            {name: (pair[0], pair[1]) for name, pair in zip(self._sums, sums, strict=True)},
            dict(zip(self._extrema, extrema, strict=True)),
            histogram,
        )
        return {**final, "backend": "+".join(sorted(self._backends))}
