#!/usr/bin/env python3
"""Write the table of faults in docs/troubleshooting.md from tests/training/faults.py, which the tests of faults assert.

python tools/check/fault_table.py
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.training.faults import FAULTS, STEP, Fault

OUTPUT = ROOT / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- faults: begin -->\n", "<!-- faults: end -->"


def main() -> None:
    OUTPUT.write_text(with_table(OUTPUT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {OUTPUT.relative_to(ROOT)}")


def with_table(page: str) -> str:
    """The page with a new table between its two markers."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def table() -> str:
    titles = [
        "what happens",
        "what the run does",
        "exit code there",
        "of all others",
        "all gone within",
        "last checkpoint",
    ]
    return "".join(_line(cells) for cells in (titles, ["---"] * len(titles), *map(_cells, FAULTS)))


def _cells(fault: Fault) -> list[str]:
    there = f"killed by {signal.Signals(-fault.code).name}" if fault.code < 0 else str(fault.code)
    if fault.where == "all" or fault.goes_on:
        others = ""
    else:
        others = str(fault.code_of_others)
    gone = "" if fault.goes_on else f"{fault.seconds:g} s"
    return [fault.what, fault.then, there, others, gone, _checkpoint(fault)]


def _checkpoint(fault: Fault) -> str:
    if fault.goes_on:
        return "as configured"
    if fault.checkpoint == STEP:
        return "of the step that it was in"
    if fault.checkpoint is not None and not fault.saves_every_step:
        return "of the step before, written now"
    return "the last one that was due before"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
