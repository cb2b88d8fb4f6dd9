"""The folder of a run: what is written is read back whole, and a folder that cannot be is refused beforehand."""

from __future__ import annotations

import json

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.schema import Config, RunConfig
from megatron_dppo.training.metrics.run_folder import RunFolder, json_lines


@pytest.fixture
def folder(tmp_path):
    config = Config(run=RunConfig(name="run", root=str(tmp_path)))
    folder = RunFolder(config.run)
    folder.create(config)
    return folder


# Line ends everywhere but in JSON Lines; a quotation mark; half of a pair that UTF-16 writes for one character.
TEXTS = ["a\u2028b", "a\u2029b\x85c", "a\x0bb\x0cc\x1cd\x1ee", "a\r\nb", 'say "x"', "\ud835"]


@pytest.mark.parametrize("text", TEXTS)
def test_resuming_keeps_every_line_whatever_is_in_it(folder, text):
    for step in (1, 2, 3):
        folder.append(folder.samples_path, {"step": step, "response": text})
    folder.forget_after(2)
    assert [json.loads(line) for line in json_lines(folder.samples_path)] == [
        {"step": 1, "response": text},
        {"step": 2, "response": text},
    ]


def test_a_line_that_a_kill_tore_is_dropped(folder):
    folder.append(folder.metrics_path, {"step": 1})
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 2, "loss"')
    folder.forget_after(9)
    assert folder.metrics_path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../other", "a/../../b", "/tmp/absolute", "nul\0"])
def test_a_name_that_is_no_folder_in_the_root_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="does not name a folder inside"):
        RunFolder(RunConfig(name=name, root=str(tmp_path)))


@pytest.mark.parametrize("obstacle", ["root", "root/run", "root/run/checkpoints", "root/run/logs"])
def test_a_file_where_a_folder_has_to_be_is_found_before_the_run(tmp_path, obstacle):
    path = tmp_path / obstacle
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    with pytest.raises(ConfigError, match=f"{path} is a file"):
        RunFolder(RunConfig(name="run", root=str(tmp_path / "root"))).check()


def test_a_folder_where_a_file_has_to_be_is_found_before_the_run(tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is no file"):
        RunFolder(RunConfig(name="run", root=str(tmp_path))).check()


def test_a_name_that_the_file_system_refuses_is_found_before_the_run(tmp_path):
    with pytest.raises(ConfigError, match="cannot be the folder of a run"):
        RunFolder(RunConfig(name="n" * 300, root=str(tmp_path))).check()


def test_checking_makes_nothing(tmp_path):
    RunFolder(RunConfig(name="run", root=str(tmp_path / "new" / "root"))).check()
    assert not list(tmp_path.iterdir())
