"""The folder of a run: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, tensorboard/, logs/ and, at the end, hf/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.load import save_config
from megatron_dppo.training.config.schema import Config, RunConfig


class RunFolder:
    """Paths and append-only files of one run. Only the rank that logs writes to it."""

    def __init__(self, run: RunConfig) -> None:
        if run.name is None:
            raise ConfigError("run.name is not set")
        self.path = Path(run.root) / run.name
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.logs = self.path / "logs"
        self.exported_policy = self.path / "hf"

    def create(self, config: Config) -> None:
        """Make the folder and write the resolved configuration."""
        for folder in (self.checkpoints, self.tensorboard, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        save_config(config, self.config_path)

    def append(self, path: Path, record: dict[str, Any]) -> None:
        """Add one JSON object as a line, complete or not at all for a reader that follows the file."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps after ``step``: a resumed run writes them again."""
        for path in (self.metrics_path, self.samples_path):
            if path.exists():
                kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
                replacement = path.with_suffix(".tmp")
                replacement.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
                replacement.replace(path)


def _step_of(line: str) -> float:
    """The step of a JSON line; a line torn by a kill counts as later than any step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
