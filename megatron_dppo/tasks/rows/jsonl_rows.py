"""The rows of a JSON lines file: their places are held, 16 bytes each; the lines are read when they are asked for."""

from __future__ import annotations

import functools
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.rows.row import Row
from megatron_dppo.tasks.strict_json import read_object


class JsonlRows:
    """One row per line that is not blank; ``strict_json.read_object`` says what a line has to be.

    Args:
        path: the file.
        limit: the first so many rows only; what stands behind them is not read.

    Raises:
        TaskError: the file cannot be read; when a row is asked for, that it has changed since.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self._path = path
        self._offsets, self._numbers = array("Q"), array("Q")
        try:
            with path.open("rb") as file:
                self._stamp = _stamp(file.fileno())
                offset = 0
                for number, line in enumerate(file, start=1):
                    if limit is not None and len(self._offsets) == limit:
                        break
                    if line.strip():
                        self._offsets.append(offset)
                        self._numbers.append(number)
                    offset += len(line)
        except OSError as error:
            raise TaskError(f"cannot read {path}: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Row:
        try:
            with self._path.open("rb") as file:
                self._check_unchanged(file.fileno())
                file.seek(self._offsets[index])
                return self._row(index, file.readline())
        except OSError as error:
            raise TaskError(f"cannot read {self._path}: {error.strerror or error}") from error

    def __iter__(self) -> Iterator[Row]:
        with self._path.open("rb") as file:
            self._check_unchanged(file.fileno())
            for index, offset in enumerate(self._offsets):
                file.seek(offset)
                yield self._row(index, file.readline())

    def _row(self, index: int, line: bytes) -> Row:
        place = f"{self._path}, line {self._numbers[index]}"
        return Row(place, functools.partial(read_object, line, place))

    def _check_unchanged(self, descriptor: int) -> None:
        if _stamp(descriptor) != self._stamp:
            raise TaskError(f"{self._path} has changed since this run began to read it; put the old file back")


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
