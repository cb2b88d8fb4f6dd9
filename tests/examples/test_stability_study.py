"""The stability study's list can be run as it stands, goes on where it was stopped, and counts what it says it counts."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from examples.stability_study import report
from examples.stability_study import run as harness
from examples.stability_study.collapse import DROP, WINDOW, outcome, wilson_interval
from examples.stability_study.execution import Workshop
from examples.stability_study.plan import SHORT, PlannedRun, StudyError, read_study
from examples.stability_study.records import AT_THE_END, SERIES, append_line, line_of, missing, read_lines
from examples.stability_study.report import END, groups, starts, table, with_table
from examples.stability_study.tightness import divergences_of
from examples.stability_study.whole_answer import whole_answer
from megatron_dppo.training.config.check import check_config
from megatron_dppo.training.config.load import load_config
from tests.models.tiny_policies import tiny_hf_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "stability_study"
STUDY = FOLDER / "study.yaml"
RUN = PlannedRun("methods-fp8-none-1", "methods", "none", "fp8", 1, "dense", ("run.seed=1",))


def test_every_planned_run_has_a_configuration_that_works():
    study = read_study(STUDY)
    models = {"dense": tiny_hf_config("qwen3", max_position_embeddings=1024, vocab_size=269)}
    models["moe"] = tiny_hf_config("qwen3_moe", max_position_embeddings=1024, vocab_size=269)
    settings = {(run.policy, run.method, run.mismatch): run for run in study.runs}
    assert len(settings) > 40
    for run in [*settings.values(), *study.warm_starts.values()]:
        check_config(load_config(study.conf, [f"model.path={run.policy}", *run.overrides]), models[run.policy], 1)


def test_a_study_that_is_stopped_has_all_methods_alike():
    runs = [run for run in read_study(STUDY).runs if run.part == "methods"]
    methods = len({run.method for run in runs})
    assert [run.seed for run in runs] == [seed for seed in (1, 2, 3, 4, 5) for _ in range(methods)]
    confirming = {run.seed for run in read_study(STUDY).runs if run.part == "confirmation"}
    assert not confirming & {run.seed for run in read_study(STUDY).runs if run.part != "confirmation"}


def test_the_whole_study_takes_at_most_four_hours_on_two_cores():
    study = read_study(STUDY)
    assert len(study.runs) * study.seconds_per_run / 2 <= 4 * 3600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["nun"]}, r"methods has no 'nun'; it has .*cispo"),
        ({"mismatches": ["fp4"]}, r"mismatches has no 'fp4'"),
        ({"seeds": [1, 1]}, r"p-fp8-none-1 is planned twice"),
    ],
)
def test_a_list_that_cannot_be_made_is_refused(tmp_path, change, message):
    text = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    text["parts"] = [{"name": "p", "mismatches": ["fp8"], "methods": ["none"], "seeds": [1], **change}]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    with pytest.raises(StudyError, match=message):
        read_study(tmp_path / "study.yaml")


def _line(run: PlannedRun, rewards: list[float], ended: str = AT_THE_END) -> dict:
    series = {name: [0.01 * (at + 1) for at in range(len(rewards))] for name in SERIES}
    return {
        **asdict(run),
        "commit": "0" * 40,
        "ended": ended,
        "seconds": 1.0,
        "series": {**series, "reward/mean": rewards},
    }


class StandInWorkshop:
    """Makes no processes; fails at one run, if told to."""

    def __init__(self, fails_at: str = "") -> None:
        self.expected_s, self.made, self.fails_at = 60.0, [], fails_at

    def warm_start(self, policy: str) -> None:
        return None

    def make(self, run: PlannedRun) -> dict:
        if run.name == self.fails_at:
            raise harness.FailedRunError("it broke")
        self.made.append(run.name)
        return _line(run, [0.5])

    def end_all(self) -> None:
        pass


def test_what_was_stopped_goes_on_with_the_runs_that_are_missing(tmp_path):
    runs, records = read_study(STUDY).runs[:5], tmp_path / "metrics.jsonl"
    with pytest.raises(harness.FailedRunError, match="it broke"):
        harness.make(list(runs), StandInWorkshop(fails_at=runs[2].name), records, time.monotonic() + 900, jobs=1)
    left = missing(runs, read_lines(records))
    assert left == list(runs[2:])
    workshop = StandInWorkshop()
    assert harness.make(left, workshop, records, time.monotonic() + 900, jobs=2) == 3
    assert sorted(workshop.made) == sorted(run.name for run in runs[2:])
    assert missing(runs, read_lines(records)) == []


def test_no_run_begins_that_would_not_end_in_time(tmp_path):
    runs, workshop = list(read_study(STUDY).runs[:2]), StandInWorkshop()
    assert harness.make(runs, workshop, tmp_path / "m", time.monotonic() + workshop.expected_s - 1, jobs=2) == 0
    assert workshop.made == []


def test_runs_that_are_made_together_do_not_share_a_core(tmp_path):
    cores = os.sched_getaffinity(0)
    workshop = Workshop(read_study(STUDY, SHORT), tmp_path, "", [])
    script = tmp_path / "cores.py"  # waits, so that all run at the same time
    script.write_text("import os, time; time.sleep(0.3); print('error: ', *os.sched_getaffinity(0))", encoding="utf-8")
    with ThreadPoolExecutor(len(cores)) as threads:
        ended = threads.map(lambda at: workshop._run_to_its_end([str(script)], str(at)), range(len(cores)))
        assert sorted(int(message.split()[1]) for _, message in ended) == sorted(cores)
    assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize(
    ("response", "reward"), [("nrat", 1.0), (" NRAT\n", 1.0), ("nra", 0.0), ("nrats", 0.0), ("", 0.0)]
)
def test_the_reward_is_all_or_nothing(response, reward):
    assert whole_answer(question="tarn", response=response, answer="nrat", metadata={}) == reward


def test_a_torn_record_is_made_again_and_harms_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_line(path, _line(RUN, [0.5]))
    path.write_text(path.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    assert missing((RUN,), read_lines(path)) == [RUN]
    append_line(path, _line(RUN, [0.5]))
    assert missing((RUN,), read_lines(path)) == []


def test_records_of_other_settings_are_not_mixed_with_new_ones():
    recorded = _line(RUN, [0.5]) | {"overrides": ["run.seed=1", "train.optimizer.lr=1"]}
    with pytest.raises(StudyError, match=r"fp8-none-1 is recorded with other settings .*train\.optimizer\.lr=1"):
        missing((RUN,), [recorded])


def test_a_record_keeps_the_curves_with_few_digits_and_no_nan(tmp_path):
    steps = [{"step": 0, "eval/accuracy": 0.25}, {"step": 1, "reward/mean": 1 / 3, "entropy": float("nan")}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps), encoding="utf-8")
    line = line_of(RUN, tmp_path, commit="c", ended=AT_THE_END, seconds=1.23)
    assert line["series"]["reward/mean"] == [0.3333]
    assert line["series"]["entropy"] == [None]
    assert line["eval_accuracy"] == [0.25]
    assert json.loads(json.dumps(line)) == {**line, "overrides": list(line["overrides"])}


RISING = [0.5 + 0.01 * step for step in range(50)]


@pytest.mark.parametrize(
    ("rewards", "collapsed_at"),
    [
        pytest.param(RISING, None, id="rises"),
        pytest.param([0.7] * 50, None, id="learns nothing"),
        pytest.param([*RISING[:30], *[RISING[29] - DROP + 0.05] * 20], None, id="falls by less"),
        pytest.param([0.7] * 10 + [0.7 - DROP - 0.01] * WINDOW, 10 + WINDOW, id="falls by more, for a whole window"),
        pytest.param([0.7] * 10 + [0.0] + [0.7] * 20, None, id="one bad step"),
        pytest.param([0.7] * 10 + [0.0] * 10 + [0.7] * 20, 12, id="falls and recovers"),
        pytest.param([0.7] + [0.1] * 10, WINDOW, id="falls from the warm start at once"),
    ],
)
def test_a_collapse_is_a_lasting_fall_below_the_best_before(rewards, collapsed_at):
    found = outcome(rewards, rewards[0], reached_its_end=True)
    assert (found.collapsed, found.step) == (collapsed_at is not None, collapsed_at)


def test_a_lucky_first_step_is_not_what_a_run_falls_from():
    rewards = [0.7] + [0.45] * 10
    assert outcome(rewards, 0.7, reached_its_end=True).collapsed
    assert not outcome(rewards, 0.5, reached_its_end=True).collapsed
    lines = [
        _line(replace(RUN, seed=seed, method=method), [reward, 0.0])
        for seed, reward in ((1, 0.7), (2, 0.3))
        for method in "ab"
    ]
    assert starts([*lines, _line(replace(RUN, seed=3), [0.8])]) == {"fp8": pytest.approx(0.6)}


def test_a_run_that_could_not_go_on_has_collapsed_and_is_not_solved():
    assert outcome([0.99] * 20, 0.99, reached_its_end=True).solved
    found = outcome([0.99] * 20, 0.99, reached_its_end=False)
    assert (found.collapsed, found.step, found.solved) == (True, 20, False)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 5, 0.0, 0.4345), (5, 5, 0.5655, 1.0), (2, 5, 0.1176, 0.7693), (0, 0, 0.0, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_intervals_are_wilsons(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


@pytest.fixture
def made_up_record(tmp_path: Path) -> Path:
    study = read_study(STUDY)
    for run in [*study.warm_starts.values(), *study.runs[:40]]:
        curve = [0.7] * 10 + [0.1] * 10 if run.method == "none" else RISING[: 20 - run.seed]
        append_line(tmp_path / "metrics.jsonl", _line(run, curve))
    return tmp_path


def test_figure_and_table_are_made_from_records(made_up_record, tmp_path):
    command = [sys.executable, str(FOLDER / "report.py"), str(made_up_record), "--table"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "f.png")], capture_output=True, text=True, timeout=120, check=True
    )
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    row = next(line for line in done.stdout.splitlines() if line.startswith("| methods | fp8 | none |"))
    # Two or three of the first 40 runs have this method.
    runs = sum(line["method"] == "none" for line in read_lines(made_up_record / "metrics.jsonl"))
    assert f"| {runs} | {runs}/{runs} (" in row
    assert "warm_start" not in done.stdout


def test_the_table_has_the_order_of_the_list_whichever_run_ended_first():
    planned = [run.name for run in read_study(STUDY).runs[:8]]
    lines = [_line(run, [0.5]) for run in reversed(read_study(STUDY).runs[:8])]
    no_more = _line(replace(RUN, name="methods-fp8-dropped-1"), [0.5])
    assert [line["name"] for line in report.in_planned_order([no_more, *lines])] == [*planned, no_more["name"]]


def test_a_study_that_is_not_complete_is_not_finished(made_up_record):
    command = [sys.executable, str(FOLDER / "report.py"), str(made_up_record), "--finish"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "runs are missing" in done.stderr
    assert not (made_up_record / "about.json").exists()


def test_a_study_that_goes_on_is_reported_with_what_is_there(made_up_record, tmp_path, monkeypatch):
    page, figure = tmp_path / "page.md", tmp_path / "figure.png"
    page.write_text((ROOT / "docs" / "stability_study.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "FIGURE", figure)
    before = read_lines(made_up_record / "metrics.jsonl")
    curves = [line for line in before if line["part"] == "methods"]
    report.finish(made_up_record, before, curves, "fp8", so_far=True)
    assert f"40 of {len(read_study(STUDY).runs)} runs have been made." in page.read_text(encoding="utf-8")
    assert figure.exists()
    assert yaml.safe_load((made_up_record / "config.yaml").read_text(encoding="utf-8"))["study"]["methods"]
    left = missing(read_study(STUDY).runs, read_lines(made_up_record / "metrics.jsonl"))
    assert len(left) == len(read_study(STUDY).runs) - 40  # what was recorded is still known as planned


def test_the_page_has_a_place_for_the_table():
    page = (ROOT / "docs" / "stability_study.md").read_text(encoding="utf-8")
    new = with_table(page, table([_line(RUN, [0.5] * 9)]))
    assert "| methods | fp8 | none | 1 | 0/1 (0% to 79%) |" in new
    assert new.partition(END)[2] == page.partition(END)[2]
    assert list(groups([_line(RUN, [0.5])])) == [("methods", "fp8", "none")]


def test_the_divergences_of_the_tightness_table_grow_from_binary_to_exact():
    log_mu, log_pi = (torch.randn(200, 30, dtype=torch.float64).mul(2).log_softmax(1) for _ in range(2))
    target = torch.randint(0, 30, (200,))
    for kind in ("tv", "kl"):
        values = list(divergences_of(kind, log_mu, log_pi, target, [5, 20]).values())
        assert all(bool((a <= b + 1e-9).all()) for a, b in itertools.pairwise(values))
        assert len(values) == 4


def _study(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_real_runs_are_recorded_and_made_once(tmp_path):
    tiny = (
        "--override",
        "warm_start.steps=0",
        "--override",
        "train.steps=2",
        "--override",
        "rollout.prompts_per_step=4",
    )
    arguments = ("--short", "--runs", str(tmp_path / "runs"), "--record", str(tmp_path), "--jobs", "2", *tiny)
    done = _study(*arguments, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = read_lines(tmp_path / "metrics.jsonl")
    names = {run.name for run in read_study(STUDY, SHORT).runs}
    assert {line["name"] for line in lines} == names | {"warm_start-dense"}
    for line in lines:
        assert line["ended"] == AT_THE_END
        assert len(line["series"]["reward/mean"]) == 2
        assert (tmp_path / "runs" / line["name"] / "config.yaml").exists()
    mismatch = {line["name"]: line["series"]["mismatch/abs_log_ratio"][0] for line in lines}
    assert mismatch["short-fp8-none-1"] > 1e-4 > mismatch["warm_start-dense"]
    assert "0 runs made, 0 of 3 missing" in _study(*arguments, timeout=60).stdout


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_short_version_ends_within_fifteen_minutes(tmp_path):
    done = _study("--short", "--runs", str(tmp_path / "runs"), "--record", str(tmp_path), timeout=880)
    assert done.returncode == 0, done.stderr
    assert missing(read_study(STUDY, SHORT).runs, read_lines(tmp_path / "metrics.jsonl")) == []
