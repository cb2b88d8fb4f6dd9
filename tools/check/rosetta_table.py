#!/usr/bin/env python3
"""Write the table in docs/rosetta.md from tests/integrations/rosetta.py, which the tests compare with the records.

python tools/check/rosetta_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.integrations.rosetta import DIFFERENCES, READINGS, Reading
from tests.integrations.rosetta_tokens import rosetta_tokens

OUTPUT = ROOT / "docs" / "rosetta.md"
BEGIN, END = "<!-- rosetta: begin -->\n", "<!-- rosetta: end -->"


def main() -> None:
    OUTPUT.write_text(with_table(OUTPUT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {OUTPUT.relative_to(ROOT)}")


def with_table(page: str) -> str:
    """The page with a new table between its two markers."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def table() -> str:
    titles = ["implementation and setting", f"of {len(rosetta_tokens().names)} tokens differ", "because of"]
    rows = "".join(_line(cells) for cells in (titles, ["---"] * len(titles), *map(_cells, READINGS)))
    return rows + "\n" + "".join(f"* *{difference.name}*: {difference.why}.\n" for difference in DIFFERENCES)


def _cells(reading: Reading) -> list[str]:
    shown = [difference for difference in reading.differences if difference.shown(reading.kind)]
    reasons = ", ".join(f"{difference.name} ({len(difference.shown(reading.kind))})" for difference in shown)
    return [reading.where, str(len(reading.expected())), reasons]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
