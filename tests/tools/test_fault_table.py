"""The table of faults in docs/troubleshooting.md is what tools/check/fault_table.py makes of tests/training/faults.py."""

from __future__ import annotations

import runpy
from pathlib import Path

from tests.training.faults import FAULTS

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "check" / "fault_table.py"))


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert page == TOOL["with_table"](page), "run tools/check/fault_table.py"


def test_the_table_has_a_row_for_every_fault_and_no_two_are_the_same() -> None:
    rows = TOOL["table"]().splitlines()[2:]
    assert len(rows) == len(set(rows)) == len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert {row.count("|") for row in rows} == {7}
