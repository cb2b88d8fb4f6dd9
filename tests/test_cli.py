"""The command ``megatron-dppo``: its table, help and exit codes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dppo.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "examples" / "conf" / "quickstart.yaml")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_command_without_importing_any(arguments: list[str]) -> None:
    program = (
        f"import sys\nfrom megatron_dppo.cli import main\nassert main({arguments}) == 0\n"
        "assert not {'torch', 'omegaconf', 'numpy'} & sys.modules.keys(), 'imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    for name, (_, meaning) in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert meaning in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: megatron-dppo {command} ")
    assert len(said.splitlines()) > 10
    assert callable(importlib.import_module(COMMANDS[command][0]).main)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean train?"),
        (["zzz"], "there are train, serve, "),
        (["train", "--config", QUICKSTART, "--check", "train.step=3"], "did you mean `train.steps`"),
        (["serve", "--config", QUICKSTART, "train.step=3"], "did you mean `train.steps`"),
        (["convert", "to-hf", "nothing", "out"], "nothing has no checkpoint.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # put back after convert
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "megatron_dppo", "trian"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "error: 'trian' is no command of megatron-dppo; did you mean train?\n")
