"""Weights & Biases: the same names as everywhere, over the step; a run that is continued goes on in the same W&B run."""

from __future__ import annotations

import math
import secrets
from pathlib import Path
from typing import Any

from megatron_dppo.compat.extras import from_extra
from megatron_dppo.training.config.schema import WandbConfig
from megatron_dppo.training.metrics.sink import Metrics

# A service that cannot be reached must not hold the ranks up for longer.
_START_TIMEOUT_S = 60.0
_FINISH_TIMEOUT_S = 120.0


class WandbSink:
    """One W&B run.

    Args:
        config: project, entity and mode.
        folder: of our run. W&B's own files are in wandb/ below it; wandb_run_id.txt says which W&B run is continued.
        name: of our run.
        settings: the resolved configuration.
    """

    def __init__(self, config: WandbConfig, folder: Path, name: str, settings: dict[str, Any]) -> None:
        with from_extra("wandb"):
            import wandb
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=name,
            id=_run_id(folder / "wandb_run_id.txt"),
            resume="allow",
            dir=str(folder),
            mode=config.mode,
            config=settings,
            settings=wandb.Settings(
                console="off",
                silent=True,
                x_disable_stats=True,
                init_timeout=_START_TIMEOUT_S,
                login_timeout=_START_TIMEOUT_S,  # without a key it asks for one, where there is a terminal
                finish_timeout=_FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )
        # Over our own step: W&B's may not go back, and a resumed run repeats some.
        self._run.define_metric("*", step_metric="step")

    def record(self, step: int, metrics: Metrics) -> None:
        """NaN and infinity are left out."""
        known = {name: value for name, value in metrics.items() if isinstance(value, str) or math.isfinite(value)}
        self._run.log({**known, "step": step})

    def close(self) -> None:
        """Hand over what is left; offline it stays in the folder, for ``wandb sync``."""
        self._run.finish()


def _run_id(file: Path) -> str:
    """That of the W&B run that this run folder already has, or a new one."""
    if file.exists():
        return file.read_text(encoding="utf-8").strip()
    new = secrets.token_hex(6)
    file.write_text(new + "\n", encoding="utf-8")
    return new
