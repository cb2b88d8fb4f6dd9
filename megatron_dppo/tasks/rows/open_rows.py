"""From the paths of a task to the rows of the files that they name."""

from __future__ import annotations

import glob
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.rows.jsonl_rows import JsonlRows
from megatron_dppo.tasks.rows.row import JoinedRows, Rows
from megatron_dppo.tasks.strict_json import read_object

# Kinds of tasks whose problems are in files.
FILE_KINDS = ("jsonl", "parquet", "dataset")


def open_rows(
    kind: str, paths: Sequence[str], limit: int | None = None, columns: Collection[str] | None = None
) -> Rows:
    """The rows of all files, in the order of ``paths``; the files of a pattern in the order of their names.

    Args:
        kind: jsonl, parquet or dataset, a folder that ``datasets`` wrote with ``save_to_disk``.
        paths: files (dataset: folders) or glob patterns, ``**`` among them.
        limit: the first so many rows only.
        columns: parquet and dataset: those that are read; None: all.

    Raises:
        TaskError: nothing is there, or it cannot be read, or a package for it is missing.
    """
    files: list[Rows] = []
    for path in _expanded(paths):
        left = None if limit is None else limit - sum(map(len, files))
        if left == 0:
            break
        files += [_open(kind, file, left, columns) for file in (_saved_files(path) if kind == "dataset" else [path])]
    return JoinedRows(files, limit)


def _expanded(paths: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if Path(path).exists() or not glob.has_magic(path):
            found.append(Path(path))
            continue
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise TaskError(f"no file matches {path}")
        found += map(Path, matches)
    repeated = next((file for file in found if found.count(file) > 1), None)
    if repeated is not None:
        raise TaskError(f"{repeated} is named twice")
    return found


def _open(kind: str, path: Path, limit: int | None, columns: Collection[str] | None) -> Rows:
    if path.is_dir():
        raise TaskError(f"{path} is a folder; name its files, e.g. {path / '*'}.{kind}")
    if kind == "jsonl":
        return JsonlRows(path, limit)
    from megatron_dppo.tasks.rows.arrow_rows import read_arrow, read_parquet  # pyarrow, which JSON lines do not need

    return (read_parquet if kind == "parquet" else read_arrow)(path, columns)


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a saved dataset, in order."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits")
        names = (
            ", ".join(str(folder / str(split)) for split in splits)
            if isinstance(splits, list)
            else "one of its folders"
        )
        raise TaskError(f"{folder} has several splits; name one of them: {names}")
    if not (folder / "state.json").is_file():
        raise TaskError(
            f"{folder} is no folder that datasets wrote with save_to_disk (it has no state.json); for a folder of parquet"
            " files use kind: parquet and a pattern"
        )
    entries: Any = _json(folder / "state.json").get("_data_files")
    try:
        return [folder / entry["filename"] for entry in entries]
    except (TypeError, KeyError):
        raise TaskError(f"{folder / 'state.json'}: _data_files should list the files of the dataset") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path.read_bytes(), str(path))
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror or error}") from error
