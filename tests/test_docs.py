"""What the documentation tells people to type works, or says why no test can tell."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from megatron_dppo.training.config.load import load_config
from tests.shell_fences import ROOT, Fence, all_fences, fences

FENCES = all_fences()
SHELL = [fence for fence in FENCES if fence.is_shell]
_OURS = re.compile(r"(?:tools|tests|examples|docs|csrc|dev)/[\w./-]*\w")


def by_place(chosen: list[Fence]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fence", [pytest.param(fence, id=fence.place) for fence in chosen])


def commands(fence: Fence) -> list[list[str]]:
    """The words of each line of a block, without what follows #."""
    lines = fence.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_every_block_of_commands_says_whether_it_is_run() -> None:
    assert [fence.place for fence in SHELL if fence.mark is None] == []
    assert any(fence.is_run for fence in SHELL)


@pytest.mark.slow
@by_place([fence for fence in SHELL if fence.is_run])
def test_commands_run_as_they_stand(fence: Fence, tmp_path: Path) -> None:
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("runs", "models", "build"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / ".bin").mkdir()
    command = tmp_path / ".bin" / "megatron-dppo"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m megatron_dppo "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(tmp_path / ".bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", textwrap.dedent(fence.text)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert fence.mark is not None
    assert done.returncode == int(fence.mark["code"] or 0), done.stdout[-2000:] + done.stderr[-2000:]


@by_place([fence for fence in SHELL if fence.mark is None or fence.mark["kind"] != "not run, of an example"])
def test_files_that_commands_name_are_there(fence: Fence) -> None:
    missing = [name for name in _OURS.findall(fence.text) if not (ROOT / name).exists()]
    assert missing == []


@by_place([fence for fence in SHELL if "--config" in fence.text])
def test_configurations_that_commands_name_are_read_with_their_overrides(fence: Fence) -> None:
    for words in commands(fence):
        if "--config" in words:
            overrides = [word for word in words[words.index("--config") :] if re.match(r"[a-z_.\[\]0-9]+=", word)]
            load_config(ROOT / words[words.index("--config") + 1], overrides)


@by_place([fence for fence in FENCES if fence.language in ("python", "yaml")])
def test_blocks_of_python_and_yaml_can_be_read(fence: Fence) -> None:
    text = textwrap.dedent(fence.text)
    if fence.language == "python":
        ast.parse(text)
    else:
        yaml.safe_load(text)


@pytest.mark.parametrize(
    ("above", "is_run", "code", "reason"),
    [
        ("<!-- run -->\n", True, None, None),
        ("text\n\n<!-- run: exit 1 -->\n", True, "1", None),
        ("<!-- not run: needs GPUs -->\n", False, None, "needs GPUs"),
        ("<!-- not run, of an example: hf is one -->\n", False, None, "hf is one"),
        ("<!-- not run: -->\n", False, None, None),
        ("<!-- run -->\n\ntext\n", False, None, None),
        ("", False, None, None),
    ],
)
def test_a_mark_belongs_to_the_block_right_below_it(
    above: str, is_run: bool, code: str | None, reason: str | None
) -> None:
    (fence,) = fences(f"{above}```bash\nls\n```\n", "page.md")
    assert fence.is_run == is_run
    assert (fence.mark and fence.mark["code"]) == code
    assert (fence.mark and fence.mark["reason"]) == reason
