"""Every figure is drawn from a record, every record says where it is from, and the tables say what the records say."""

from __future__ import annotations

import datetime
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RECORDS = sorted(path.parent for path in (ROOT / "docs" / "records").glob("*/about.json"))
RUNS = [record for record in RECORDS if "tools/plot_run.py" in (record / "about.json").read_text(encoding="utf-8")]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOL = runpy.run_path(str(ROOT / "tools" / "check" / "record_run.py"))


def _about(record: Path) -> dict[str, Any]:
    return json.loads((record / "about.json").read_text(encoding="utf-8"))


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for entry in value.values() for text in _strings(entry)]
    if isinstance(value, list):
        return [text for entry in value for text in _strings(entry)]
    return [value] if isinstance(value, str) else []


def test_every_figure_has_a_record_and_every_record_a_figure() -> None:
    shown = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    drawn = {ROOT / "docs" / "figures" / f"{record.name}.png" for record in RECORDS}
    assert shown <= drawn, "a page shows a figure without a record"
    assert drawn == set((ROOT / "docs" / "figures").iterdir())
    assert not list((ROOT / "examples").glob("*.png"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_a_record_says_where_its_figures_are_from(record: Path) -> None:
    about = _about(record)
    assert set(about) == {"commit", "command", "date", "machine", "draw"}
    assert re.fullmatch(r"[0-9a-f]{40}", about["commit"])
    assert about["command"]
    assert datetime.date.fromisoformat(about["date"])
    assert {"cpu", "cores", "torch", "megatron-core"} <= set(about["machine"])
    config = yaml.safe_load((record / "config.yaml").read_text(encoding="utf-8"))
    assert config
    assert [json.loads(line) for line in (record / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    words = [word for text in _strings([config, about]) for word in text.split()]
    assert not [word for word in words if word.startswith("/")], "a path of the machine that it ran on"


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_a_figure_can_be_drawn_from_its_record(record: Path, tmp_path: Path) -> None:
    command, _, figure = _about(record)["draw"].partition(" --output ")
    python, tool, *arguments = command.split()
    assert python == "python"
    assert figure in ("", f"docs/figures/{record.name}.png")
    picture = tmp_path / "figure.png"
    subprocess.run(
        [sys.executable, tool, *arguments, "--output" if figure else "--plot", str(picture)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=120,
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("record", RUNS, ids=lambda record: record.name)
def test_the_readme_says_of_a_run_what_its_record_says(record: Path) -> None:
    assert TOOL["table_row"](record) + "\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_kernels_says_what_its_record_says() -> None:
    bench = runpy.run_path(str(ROOT / "tools" / "bench" / "policy_stats.py"))
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    record = ROOT / "docs" / "records" / "policy_stats"
    assert record in RECORDS
    assert bench["with_table"](page, bench["read_charts"](record)) == page


def test_what_is_kept_of_a_run_names_no_place_and_has_few_digits(tmp_path: Path) -> None:
    config = {"model": {"path": str(ROOT / "models" / "tiny")}, "urls": ["/opt/env/bin/python"], "steps": 3, "x": None}
    TOOL["write_record"](
        tmp_path / "r", config, [{"step": 1, "loss": 1 / 3}], command="c", draw="d", commit="0" * 40, ended=0.0
    )
    kept = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text(encoding="utf-8"))
    assert kept == {"model": {"path": "models/tiny"}, "urls": ["python"], "steps": 3, "x": None}
    assert (tmp_path / "r" / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1, "loss": 0.333333}\n'
    assert _about(tmp_path / "r")["date"] == "1970-01-01"


def test_a_row_replaces_the_one_of_its_record_or_is_added() -> None:
    page = "| record |\n|---|\n| [a](docs/records/a) | 1 |\n| [b](docs/records/b) | 2 |\n\nText.\n"
    assert TOOL["with_row"](page, "a", "| new |") == page.replace("| [a](docs/records/a) | 1 |", "| new |")
    assert TOOL["with_row"](page, "c", "| new |") == page.replace("| 2 |\n", "| 2 |\n| new |\n")
    with pytest.raises(SystemExit, match="no table of results"):
        TOOL["with_row"]("Text.\n", "a", "| new |")
