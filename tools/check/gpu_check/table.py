"""The rows: appended to a file as they come, one JSON object a line, and a Markdown table of all at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

Outcome = Literal["passed", "failed", "measured", "skipped", "not run"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        section: a name of ``sections.SECTIONS``, or ``preparation``.
        check: what was looked at.
        outcome: ``measured``: there was nothing to demand. ``skipped``: it cannot be looked at here. ``not run``: the time
            that the whole had was over.
        figures: for people.
        values: the same for programs.
        seconds: how long it took.
    """

    section: str
    check: str
    outcome: Outcome
    figures: str
    values: Mapping[str, float | int | str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_bad(self) -> bool:
        """Whether the exit code has to tell."""
        return self.outcome in ("failed", "not run")


class Table:
    """Rows in a file and on the terminal as they come."""

    def __init__(self, folder: Path) -> None:
        """``folder`` gets ``rows.jsonl``, made anew, and at the end ``table.md``."""
        self.rows: list[Row] = []
        self._file, self._markdown = folder / "rows.jsonl", folder / "table.md"
        self._file.write_text("")

    def add(self, row: Row) -> None:
        """Keep and print a row."""
        self.rows.append(row)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(f"{row.section:13} {row.outcome:8} {row.check}: {row.figures}", flush=True)

    def finish(self) -> str:
        """Write the Markdown table, and return it."""
        text = markdown(self.rows)
        self._markdown.write_text(text, encoding="utf-8")
        return text


def markdown(rows: list[Row]) -> str:
    """All rows; what failed is in bold."""
    lines = ["| section | check | outcome | figures | s |", "|---|---|---|---|---|"]
    for row in rows:
        outcome = f"**{row.outcome}**" if row.is_bad else row.outcome
        cells = (row.section, row.check, outcome, row.figures, f"{row.seconds:.1f}")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
