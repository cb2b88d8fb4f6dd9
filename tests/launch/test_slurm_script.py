"""The batch script: what it asks Slurm for, and what it does when things end. Bash runs it; Slurm's commands are stand-ins.

tests/launch/test_slurm.py has a real Slurm run it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.config import Recipe
from megatron_dppo.launch.job import describe
from megatron_dppo.launch.recipes import RECIPES, load_recipe
from megatron_dppo.launch.slurm_script import batch_script
from tests.launch.jobs import ELSEWHERE, on_gpus
from tests.waiting import wait_until

SCRIPTS = Path(__file__).parent / "scripts"
# A step of the trainer ends as its test says, or, once it is asked to stop, with 75; servers serve until their input ends.
_SRUN = """#!/bin/bash
case "$*" in
  *--input=all*)
    if [ -n "${SERVERS_END:-}" ]; then sleep 0.2; exit "$SERVERS_END"; fi
    cat; echo ended >"$ATTEMPT/servers.said"; exit 0 ;;
esac
: >"$ATTEMPT/trainer.started"
printf '%s\\n' "$@" >"$ATTEMPT/trainer.arguments"
if [ -n "${TRAINER_ENDS:-}" ]; then
  for code in $TRAINER_ENDS; do echo "$code" >"$ATTEMPT/trainer-$((node++)).exit"; done
  exit "${SRUN_SAYS:-$code}"
fi
for _ in $(seq 200); do
  [ -e "$ATTEMPT/stop" ] && { echo 75 >"$ATTEMPT/trainer-0.exit"; exit 75; }
  sleep 0.05
done
exit 99
"""
_SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") echo n1 ;;
  "--oneliner show") echo "NodeName=$4 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=$4" ;;
  requeue*) echo "$2" >>"$REQUEUED" ;;
esac
"""


class Batch:
    """The script of a job in a folder, started as Slurm would."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        recipe.launch.directory = str(folder)
        self.job = describe(recipe)
        self.requeued = folder / "requeued"
        (folder / "bin").mkdir()
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.script = folder / "job.sbatch"
        self.script.write_text(batch_script(self.job))
        self._path = f"{folder / 'bin'}:{os.environ['PATH']}"

    def attempt(self, start: int = 1) -> Path:
        return self.job.folder / "slurm-7" / f"start-{start}"

    def begin(self, start: int = 1, **environment: str) -> subprocess.Popen[str]:
        known = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(start - 1)}
        known |= {"ATTEMPT": str(self.attempt(start)), "REQUEUED": str(self.requeued), "PATH": self._path}
        self._process = subprocess.Popen(
            ["bash", str(self.script)],
            env={**os.environ, **known, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self._process

    def run(self, start: int = 1, **environment: str) -> tuple[int, str]:
        process = self.begin(start, **environment)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    def close(self) -> None:
        """Nothing is left, whatever failed."""
        with contextlib.suppress(AttributeError, ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def was_requeued(self) -> bool:
        return self.requeued.exists()


@pytest.fixture
def batch(tmp_path: Path) -> Iterator[Callable[..., Batch]]:
    with contextlib.ExitStack() as stack:
        yield lambda *overrides: stack.enter_context(contextlib.closing(Batch(tmp_path, on_gpus(*overrides))))


@pytest.mark.parametrize(
    ("codes", "srun_says", "code", "requeued"),
    [
        ("0 0", "0", 0, False),
        ("75 75", "75", 75, True),
        ("75", "143", 75, True),  # a node was ended on its way out
        ("3 4", "4", 3, False),  # srun knows the largest only
        ("2 2", "2", 2, False),
        ("4", "137", 137, False),
    ],
)
def test_it_ends_with_the_code_of_the_run_and_requeues_what_has_saved(batch, codes, srun_says, code, requeued) -> None:
    script = batch()
    assert script.run(TRAINER_ENDS=codes, SRUN_SAYS=srun_says)[0] == code
    assert script.was_requeued() is requeued
    assert (script.attempt() / "servers.said").read_text() == "ended\n"  # and were waited for


def test_it_is_not_requeued_for_ever(batch) -> None:
    script = batch("launch.max_restarts=2")
    assert script.run(start=2, TRAINER_ENDS="75")[0] == 75
    assert script.was_requeued()
    script.requeued.unlink()
    code, output = script.run(start=3, TRAINER_ENDS="75")
    assert (code, script.was_requeued()) == (75, False)
    assert "launch.max_restarts = 2: not started again" in output


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_warning_saves_and_requeues_and_a_cancelled_job_saves_and_ends(batch, number, requeued) -> None:
    script = batch()
    process = script.begin()
    wait_until((script.attempt() / "trainer.started").exists, within_s=20, what="the trainer's step starts")
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, script.was_requeued()) == (75, requeued), output


@pytest.mark.parametrize("code", [2, 3])
def test_servers_that_end_first_stop_the_run_and_are_named(batch, code) -> None:
    script = batch()
    ended, output = script.run(SERVERS_END=str(code))
    assert (ended, script.was_requeued()) == (code, False)
    assert f"the servers ended first, with exit code {code}" in output


def test_an_allocation_that_is_split_has_one_header_and_two_places(batch) -> None:
    script = batch("launch.slurm.heterogeneous=false", "launch.slurm.options=['--qos=high']")
    text = script.script.read_text()
    assert "hetjob" not in text
    assert "#SBATCH --nodes=3\n" in text
    assert "--relative=0" in text
    assert "--relative=2" in text
    assert text.count("#SBATCH --qos=high") == 1
    assert script.run(TRAINER_ENDS="0")[0] == 0


def test_servers_larger_than_a_node_know_the_addresses_of_all(batch) -> None:
    script = batch("rollout.sglang.tensor_model_parallel_size=16", "launch.server_nodes=4")
    assert script.run(TRAINER_ENDS="0", SLURM_JOB_NODELIST_HET_GROUP_1="s[1-4]")[0] == 0
    assert '--addresses "$server_addresses"' in script.script.read_text()


def test_containers_get_image_mounts_and_working_directory(batch) -> None:
    text = batch("launch.container.image=site/dppo:1", "launch.container.mounts=[/data:/data]").script.read_text()
    assert text.count("--container-image=site/dppo:1") == 2
    assert text.count("--container-mounts=/data:/data") == 2


@pytest.mark.parametrize(
    "value", ["$(touch {0})", "`touch {0}`", "a'; touch {0}; '", 'a"; touch {0}; "', "a\ntouch {0}\n"]
)
def test_no_value_is_run_by_the_shell(tmp_path: Path, value: str) -> None:
    """Environment, interpreter and image reach the process as they are: whatever stands in them."""
    evil = value.format(tmp_path / "pwned")
    recipe = on_gpus()
    recipe.launch.env = {"EVIL": evil}
    recipe.launch.python = evil
    recipe.launch.container.image = evil
    with contextlib.closing(Batch(tmp_path, recipe)) as script:
        assert script.run(TRAINER_ENDS="0")[0] == 0
    assert not (tmp_path / "pwned").exists()
    arguments = (script.attempt() / "trainer.arguments").read_text()
    assert f"\nEVIL={evil}\n" in arguments
    assert f"\n{evil}\n-m\nmegatron_dppo.launch.agent\n" in arguments
    assert f"--container-image={evil}\n" in arguments


@pytest.mark.parametrize("name", ["a b", "a$(x)", "a%j", "a'b", "a\nb"])
def test_a_run_whose_folder_no_script_can_name_is_refused(name: str) -> None:
    job = describe(on_gpus())
    with pytest.raises(ConfigError, match=r"choose run\.root and run\.name without"):
        batch_script(replace(job, run_folder=Path("/shared") / name))


def kept_script(recipe: str) -> str:
    """What tests/launch/scripts holds for a recipe; tools/check/launch_scripts.py writes it."""
    return batch_script(describe(load_recipe(recipe, [*ELSEWHERE, "cluster=slurm", "launch.slurm.account=me"])))


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_the_script_of_every_recipe_is_the_one_that_was_looked_at(recipe: str) -> None:
    text = kept_script(recipe)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=20)
    assert text == (SCRIPTS / f"{recipe}.sbatch").read_text(), (
        "python tools/check/launch_scripts.py, and look at the change"
    )
