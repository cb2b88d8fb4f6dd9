"""The table in docs/rosetta.md is what tools/check/rosetta_table.py makes of tests/integrations/rosetta.py."""

from __future__ import annotations

import runpy
from pathlib import Path

from tests.integrations.rosetta import READINGS

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "check" / "rosetta_table.py"))


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "rosetta.md").read_text(encoding="utf-8")
    assert page == TOOL["with_table"](page), "run tools/check/rosetta_table.py"


def test_the_table_has_a_row_for_every_reading() -> None:
    rows = [line for line in TOOL["table"]().splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(set(rows)) == len(READINGS)
