"""What every kind of data file gives: numbered rows that are read when they are asked for."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class ReadRow(Protocol):
    """Reads the fields of one row."""

    def __call__(self, exact: bool = False) -> dict[str, Any]:
        """JSON-like values by field. Raises TaskError, naming the place, where the row cannot be read.

        Args:
            exact: numbers with a fraction are Decimals of the value written where the file has one, not floats near it.
        """
        ...


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        place: file and number, as an error names it; numbers start at 1.
        read: its fields.
    """

    place: str
    read: ReadRow


class Rows(Protocol):
    """The rows of one or several files. What they hold in memory does not grow with what stands in the rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def __iter__(self) -> Iterator[Row]:
        """All of them in order, which is quicker than one by one."""
        ...


class JoinedRows:
    """The rows of several files, one file after the other; only the first ``limit`` of them, if that is given."""

    def __init__(self, files: Sequence[Rows], limit: int | None = None) -> None:
        self._files = files
        self._ends = list(itertools.accumulate(len(file) for file in files))
        total = self._ends[-1] if self._ends else 0
        self._length = total if limit is None else min(total, limit)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._length:
            raise IndexError(f"there are {self._length} rows; there is no number {index}")
        file = bisect.bisect_right(self._ends, index)
        return self._files[file][index - (self._ends[file - 1] if file else 0)]

    def __iter__(self) -> Iterator[Row]:
        return itertools.islice(itertools.chain.from_iterable(self._files), self._length)
