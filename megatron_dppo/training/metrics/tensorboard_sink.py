"""TensorBoard: numbers as curves, texts where they change."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_dppo.compat.extras import from_extra
from megatron_dppo.training.metrics.sink import Metrics

with from_extra("train"):
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink:
    """Event files in ``folder``; what they have of steps after ``step`` is not shown any more."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._texts: dict[str, str] = {}

    def record(self, step: int, metrics: Metrics) -> None:
        """NaN and infinity are left out: a curve has no place for them."""
        for name, value in metrics.items():
            if isinstance(value, str):
                if self._texts.get(name) != value:  # a text has no curve: only its changes are worth an entry
                    self._writer.add_text(name, value, step)
                self._texts[name] = value
            elif math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()
