"""Whoever comes first says what all ranks have to say, and the others do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dppo.distributed.said_once import is_first_to_say

ROOT = Path(__file__).parents[2]
EVERY_RANK = "from megatron_dppo.distributed.said_once import is_first_to_say as first\n"


def run_on_ranks(script: Path, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*launcher, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=200
    )


def test_a_single_process_always_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [is_first_to_say("a"), is_first_to_say("a")] == [True, True]


def test_without_a_store_every_rank_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert is_first_to_say("a")


@pytest.mark.slow
def test_what_ranks_have_in_common_is_said_once_and_the_rest_by_each(tmp_path: Path) -> None:
    script = tmp_path / "say.py"
    script.write_text(
        f"import os\n{EVERY_RANK}rank = os.environ['RANK']\n"
        "for message in ('common', 'common', f'of rank {rank}', 'a \\ud835'):\n"
        "    if first(message): print(f'said: {message!a}\\n', end='', flush=True)\n"  # in one piece, of three processes
    )
    done = run_on_ranks(script, ranks=3)
    assert done.returncode == 0, done.stderr
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("said:"))
    assert said == ["said: 'a \\ud835'", "said: 'common'", *(f"said: 'of rank {rank}'" for rank in range(3))]


@pytest.mark.slow
@pytest.mark.parametrize("slow_rank", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_bad_input_is_explained_once_however_slow_a_rank_is(tmp_path: Path, slow_rank: int) -> None:
    """The slow rank never comes to speak: torchrun ends it, once the other is gone."""
    script = tmp_path / "slow.py"
    script.write_text(
        f"import os, runpy, signal\nif os.environ['RANK'] == '{slow_rank}': signal.pause()\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'pretrain_dppo.py')!r}, run_name='__main__')\n"
    )
    config = ROOT / "examples" / "conf" / "quickstart.yaml"
    done = run_on_ranks(script, "--config", str(config), "train.step=3")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "did you mean `train.steps`" in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
