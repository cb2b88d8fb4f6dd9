"""From run folders to the page: bounded, whole where it can be, and one clear line where there is no run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_dppo.launch.report.command import main
from megatron_dppo.launch.report.page import render
from megatron_dppo.launch.report.page_data import page_data
from megatron_dppo.launch.report.panels import PANELS
from megatron_dppo.launch.report.run_data import read_runs
from tests.launch.report.made_runs import RECORD, STEPS, copy_of_the_record, write_long_run, write_run

METRICS_PAGE = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_every_curve_is_a_metric_that_is_documented() -> None:
    assert [name for panel in PANELS for name in panel.metrics if f"`{name}`" not in METRICS_PAGE] == []


def test_a_run_is_read_with_all_that_its_folder_holds(tmp_path) -> None:
    (run,) = page_data(read_runs([write_run(tmp_path, "run")]))["runs"]
    assert run["name"] == "run"
    assert run["x"]["step"] == list(range(STEPS + 1))
    assert run["distributions"]["last"][-1] == STEPS
    assert sum(sum(counts) for counts in run["distributions"]["reward"]["counts"]) == STEPS * 8
    assert [alarm["step"] for alarm in run["alarms"]] == [12]
    assert run["config"]["algorithm.loss.delta_low"] == "0.1"
    assert {sample["chosen"] for sample in run["samples"]} == {"worst", "best", "spread"}
    assert run["summary"]["accuracy"][0] == pytest.approx(0.0977, abs=1e-4)


def test_a_long_run_makes_no_long_page_and_a_torn_line_is_left_out(tmp_path) -> None:
    data = page_data(read_runs([write_long_run(tmp_path, 3000)]))
    (run,) = data["runs"]
    assert len(run["x"]["step"]) <= 600
    assert run["x"]["step"][-1] == 3000
    assert run["every"] == 5
    assert len(render(data)) < 2_000_000


def test_runs_of_the_same_name_are_told_apart(tmp_path) -> None:
    for parent in ("a", "b"):
        copy_of_the_record(tmp_path / parent, "run")
    assert [run.name for run in read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])] == ["a/run", "b/run"]


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (["nowhere"], "nowhere/metrics.jsonl: no such file; give the folder of a run"),
        (["empty"], "has no steps yet; wait for the first one"),
        (["record", "record"], "is given twice"),
        (["record"] * 9, "9 runs: a page can show 8 at most"),
    ],
)
def test_what_is_no_run_is_one_line_and_exit_code_2(tmp_path, capsys, runs, words) -> None:
    copy_of_the_record(tmp_path, "record")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    arguments = [*(str(tmp_path / run) for run in runs), "--output", str(tmp_path / "report.html")]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_the_page_is_one_file_without_a_network(tmp_path, capsys) -> None:
    page = tmp_path / "out" / "report.html"
    assert main([str(RECORD), "--output", str(page), "--title", "a <b> title"]) == 0
    text = page.read_text(encoding="utf-8")
    assert "<title>a &lt;b&gt; title</title>" in text
    assert "default-src 'none'" in text
    outside = set(re.findall(r"https?://[^\s\"'`]+", text))
    assert outside == {"http://www.w3.org/2000/svg"}  # a namespace, which nobody fetches
    assert "<!--" not in text
