"""The rows of Arrow and parquet files, mapped into memory: what is held per row is nothing, and pages come and go.

A parquet file is decoded once, a batch at a time, into an unnamed temporary Arrow file: a row of parquet cannot be read
without all others of its row group, which may be the whole file. ``TMPDIR`` says where such files go.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_dppo.compat.extras import from_extra
from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.rows.arrow_values import converter
from megatron_dppo.tasks.rows.row import Row
from megatron_dppo.tasks.valid_text import check_text

with from_extra("data"):
    import pyarrow as pa
    import pyarrow.parquet as pq

_BATCH = 1000  # rows that are decoded together


class ArrowRows:
    """Rows of record batches. Nulls are left out, at the top and in structs.

    Args:
        path: the file, for messages.
        schema: of the batches.
        batches: the rows.
        columns: those to read; None: all.

    Raises:
        TaskError: two columns have one name.
    """

    def __init__(
        self, path: Path, schema: pa.Schema, batches: Sequence[pa.RecordBatch], columns: Collection[str] | None = None
    ) -> None:
        _check_names(path, schema)
        names = [name for name in schema.names if columns is None or name in columns]
        self._path = path
        self._batches = [batch.select(names) for batch in batches]
        self._ends = list(itertools.accumulate(batch.num_rows for batch in self._batches))
        self._converters = {
            exact: {name: converter(schema.field(name).type, exact) for name in names} for exact in (False, True)
        }

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        number = bisect.bisect_right(self._ends, index)
        offset = index - (self._ends[number - 1] if number else 0)
        return self._row(index, self._batches[number].slice(offset, 1), None)

    def __iter__(self) -> Iterator[Row]:
        index = 0
        for batch in self._batches:
            for start in range(0, batch.num_rows, _BATCH):
                piece = batch.slice(start, _BATCH)
                try:
                    values: list[dict[str, Any] | None] = piece.to_pylist()
                except Exception:  # one of them cannot be read; each says for itself whether it is the one
                    values = [None] * piece.num_rows
                for offset, value in enumerate(values):
                    yield self._row(index, piece.slice(offset, 1), value)
                    index += 1

    def _row(self, index: int, one: pa.RecordBatch, value: dict[str, Any] | None) -> Row:
        place = f"{self._path}, row {index + 1}"

        def read(exact: bool = False) -> dict[str, Any]:
            fields = {}
            for name, item in (_to_python(one, place) if value is None else value).items():
                if item is not None:
                    fields[name] = self._convert(name, item, exact, place)
            return fields

        return Row(place, read)

    def _convert(self, name: str, item: Any, exact: bool, place: str) -> Any:
        convert = self._converters[exact][name]
        try:
            converted = item if convert is None else convert(item)
        except ValueError as error:
            raise TaskError(
                f"{place}: {name}: {error} (a column that nothing needs can be left out with fields.metadata)"
            ) from None
        check_text(name, f"{place}: a column name")
        check_text(converted, f"{place}: {name}")
        return converted


def read_parquet(path: Path, columns: Collection[str] | None = None) -> ArrowRows:
    """The rows of a parquet file. Raises TaskError if it is none, or damaged."""
    try:
        with path.open("rb") as opened:
            file = pq.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False)
            _check_names(path, file.schema_arrow)
            names = [name for name in file.schema_arrow.names if columns is None or name in columns]
            schema = pa.schema([_without_dictionary(file.schema_arrow.field(name)) for name in names])
            spool = tempfile.TemporaryFile(prefix="megatron_dppo_rows_")  # noqa: SIM115  lives as long as its map
            with pa.ipc.new_stream(spool, schema) as writer:
                for batch in file.iter_batches(batch_size=_BATCH, columns=names):
                    writer.write_batch(batch.cast(schema))
    except (OSError, pa.ArrowException) as error:
        raise TaskError(f"cannot read {path} as parquet: {_reason(error)}") from error
    return ArrowRows(path, schema, _mapped_batches(spool)[1])


def read_arrow(path: Path, columns: Collection[str] | None = None) -> ArrowRows:
    """The rows of an Arrow file, as ``datasets`` saves them. Raises TaskError if it is none, or damaged."""
    try:
        with path.open("rb") as file:
            schema, batches = _mapped_batches(file)
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: an empty file cannot be mapped
        raise TaskError(f"cannot read {path} as Arrow: {_reason(error)}") from error
    return ArrowRows(path, schema, batches, columns)


def _check_names(path: Path, schema: pa.Schema) -> None:
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        raise TaskError(f"{path}: the column {repeated[0]} is there twice")


def _mapped_batches(file: BinaryIO | Any) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    file.flush()
    buffer = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if buffer[:6].to_pybytes() == b"ARROW1":
        reader = pa.ipc.open_file(buffer)
        return reader.schema, [reader.get_batch(index) for index in range(reader.num_record_batches)]
    stream = pa.ipc.open_stream(buffer)
    return stream.schema, list(stream)


def _to_python(one: pa.RecordBatch, place: str) -> dict[str, Any]:
    try:
        (value,) = one.to_pylist()
    except Exception as error:  # text that is no UTF-8, a date that Python has not
        raise TaskError(f"{place}: {_reason(error)}") from error
    return value  # type: ignore[no-any-return]


def _without_dictionary(field: pa.Field) -> pa.Field:
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
