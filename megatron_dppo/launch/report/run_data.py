"""What a run's folder, or a record of a run, holds: read as it is, also while the run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.schema import RunConfig
from megatron_dppo.training.metrics.run_folder import RunFolder, json_records

MOST_RUNS = 8  # more colours cannot be told apart


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        name: of its folder; several of the same name are told apart by the folders above.
        folder: where it is.
        metrics: of each step, in their order; one per step.
        distributions, samples, alarms: lines of the files of these names; empty where there is none.
        failures: how many samples could not be used.
        config: {"section.key": value}; empty where there is no config.yaml.
    """

    name: str
    folder: Path
    metrics: list[dict[str, Any]]
    distributions: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0
    config: dict[str, Any] = field(default_factory=dict)


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """The runs in ``folders``. Raises ConfigError that names the folder in which there is none."""
    if len(folders) > MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs: a page can show {MOST_RUNS} at most")
    resolved = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, resolved, strict=True):
        if resolved.count(path) > 1:
            raise ConfigError(f"{folder} is given twice")
    return [_read(path, name) for path, name in zip(resolved, _names(resolved), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(path: Path, name: str) -> RunData:
    folder = RunFolder(RunConfig(name=path.name, root=str(path.parent)))
    if not folder.metrics_path.is_file():
        raise ConfigError(f"{folder.metrics_path}: no such file; give the folder of a run (runs/NAME)")
    # A run that was killed while it repeated a step may have two lines of it: the later one counts.
    by_step = {record["step"]: record for record in _with_step(folder.metrics_path)}
    if not by_step:
        raise ConfigError(f"{folder.metrics_path} has no steps yet; wait for the first one")
    return RunData(
        name=name,
        folder=path,
        metrics=[by_step[step] for step in sorted(by_step)],
        distributions=_with_step(folder.distributions_path),
        samples=_with_step(folder.samples_path),
        alarms=_with_step(folder.alarms_path),
        failures=len(_with_step(folder.failures_path)),
        config=_config(folder.config_path),
    )


def _with_step(path: Path) -> list[dict[str, Any]]:
    return [record for record in json_records(path) if isinstance(record.get("step"), int)]


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    return flat(loaded)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"section.key": value} of nested sections; a list's items are numbered."""
    items: Any = None
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    if items is None:
        return {prefix: value} if prefix else {}
    result: dict[str, Any] = {}
    for key, inner in items:
        result |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return result
