"""The folder of a run: config.yaml, metrics.jsonl, samples.jsonl, distributions.jsonl, failures.jsonl, alarms.jsonl,
checkpoints/, tensorboard/, logs/; evidence/ where a step was skipped or an alarm given; at the end, hf/.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.load import save_config
from megatron_dppo.training.config.schema import Config, RunConfig


class RunFolder:
    """Paths and append-only files of one run. Only the rank that logs writes to it."""

    def __init__(self, run: RunConfig) -> None:
        if run.name is None:
            raise ConfigError("run.name is not set")
        escapes = Path(run.name).is_absolute() or {"..", "."} & {*run.name.split("/")}
        if escapes or not run.name.strip() or "\0" in run.name:
            raise ConfigError(f"run.name={run.name!r} does not name a folder inside of run.root")
        self.path = Path(run.root) / run.name
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.jsonl"
        self.distributions_path = self.path / "distributions.jsonl"
        self.alarms_path = self.path / "alarms.jsonl"
        self.failures_path = self.path / "failures.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.logs = self.path / "logs"
        self.evidence = self.path / "evidence"
        self.exported_policy = self.path / "hf"

    def check(self) -> None:
        """Raise ConfigError if the folder cannot be made, or cannot be written to. Nothing is made yet."""
        try:
            for folder in self._folders():
                _check_folder(folder)
            for file in (self.config_path, *self._line_files()):
                if file.exists() and not (file.is_file() and os.access(file, os.W_OK)):
                    raise ConfigError(f"{file} is no file that can be written: choose another run.name or run.root")
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{str(self.path)!r} cannot be the folder of a run: {error}") from error

    def create(self, config: Config) -> None:
        """Make the folder and write the resolved configuration."""
        for folder in self._folders():
            folder.mkdir(parents=True, exist_ok=True)
        save_config(config, self.config_path)

    def append(self, path: Path, record: dict[str, Any]) -> None:
        """Add one JSON object as a line, complete or not at all for a reader that follows the file."""
        # A lone surrogate, which UTF-8 cannot hold, becomes its own JSON escape.
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")
        with path.open("ab+") as file:
            if (
                file.tell() and _last_byte(file) != b"\n"
            ):  # a disk was full amid the line before: it is lost, this one is not
                line = b"\n" + line
            file.write(line)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps after ``step``: a resumed run writes them again."""
        for path in self._line_files():
            if path.exists():
                kept = [line for line in json_lines(path) if _step_of(line) <= step]
                replacement = path.with_suffix(".tmp")
                replacement.write_bytes(b"".join(line + b"\n" for line in kept))
                replacement.replace(path)

    def _line_files(self) -> tuple[Path, ...]:
        return (self.metrics_path, self.samples_path, self.distributions_path, self.failures_path, self.alarms_path)

    def _folders(self) -> tuple[Path, ...]:
        return (self.path, self.checkpoints, self.tensorboard, self.logs)


def json_lines(path: Path) -> Iterator[bytes]:
    """The lines of a JSON Lines file, which only ``\\n`` ends: a text may hold U+2028 and what else ends lines elsewhere."""
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            yield line


def json_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, but for lines that a kill or a full disk has torn; nothing if there is no file."""
    for line in json_lines(path) if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _step_of(line: bytes) -> float:
    """The step of a JSON line; a line torn by a kill counts as later than any step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _check_folder(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{existing} is a file where a run would have a folder: choose another run.root or run.name")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{existing} cannot be written to: choose another run.root")
