"""Runs that are killed, or asked to stop, go on as if nothing had happened: on two processes, with the example script."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch

from megatron_dppo.training.checkpoint.load import last_checkpoint
from tests.forked_ranks import StartedScript, run_script
from tests.training.tiny_runs import (
    QUICK_SCRIPT,
    deterministic_part,
    kill,
    launch_training,
    processes_of,
    read_metrics,
    start_training,
    train,
    training_arguments,
    wait_for_step,
    write_tiny_policy,
)
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 8
SMALL = (
    "warm_start.steps=5",
    f"train.steps={STEPS}",
    "train.updates_per_rollout=2",
    "rollout.prompts_per_step=4",
    "eval.prompts=8",
    "eval.every=4",
    "checkpoint.every=3",
)

COMPARED = {"step", "reward/mean", "rollout/length_mean", "eval/accuracy", "loss", "entropy"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory) -> list[dict]:
    """The records of a run that nothing happened to."""
    return train(policy, tmp_path_factory.mktemp("whole"), "run", *SMALL)


@pytest.fixture(scope="module")
def killed_in_a_step(policy, tmp_path_factory) -> Path:
    """The folder of runs in which "run" has been killed in step 5 or a little later; its last checkpoint is of step 3."""
    runs = tmp_path_factory.mktemp("killed")
    run = start_training(policy, runs, "run", *SMALL)
    wait_for_step(runs / "run", 4)
    kill(run)
    assert last_checkpoint(runs / "run" / "checkpoints").name == "step_00000003"
    return runs


def test_a_run_that_is_killed_in_a_step_resumes_with_the_same_numbers(policy, whole, killed_in_a_step, tmp_path):
    shutil.copytree(killed_in_a_step / "run", tmp_path / "run")
    resumed = train(policy, tmp_path, "run", *SMALL)
    assert [deterministic_part(record) for record in resumed] == [deterministic_part(record) for record in whole]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ("parallel.expert_model_parallel_size=1", "parallel.use_distributed_optimizer=true"),
            id="TP2 distributed",
            marks=pytest.mark.nightly,  # tests/layouts/test_checkpoint_layouts.py resumes there
        ),
        pytest.param(
            (
                "parallel.tensor_model_parallel_size=1",
                "parallel.expert_model_parallel_size=1",
                "parallel.pipeline_model_parallel_size=2",
                "train.micro_batch_size=8",
            ),
            id="PP2",
        ),
    ],
)
def test_a_run_that_is_killed_resumes_on_another_layout(policy, whole, killed_in_a_step, tmp_path, overrides):
    """One replica before and after: with more replicas each would draw its samples from a random stream of its own.

    Another layout sums in another order, 1e-7 at every step. That is too little to change a sampled token here, and to
    show in a mean; the norm of a gradient has it magnified by the cancellation in a gradient.
    """
    shutil.copytree(killed_in_a_step / "run", tmp_path / "run")
    resumed = train(policy, tmp_path, "run", *SMALL, *overrides)
    assert [record.keys() & COMPARED for record in resumed] == [record.keys() & COMPARED for record in whole]
    for record, expected in zip(resumed, whole, strict=True):
        for name in record.keys() & COMPARED:
            assert record[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (record["step"], name)


# SIGTERM on every push in test_faults.py.
@pytest.mark.parametrize("asked", [pytest.param("SIGTERM", marks=pytest.mark.nightly), "SIGUSR1"])
def test_a_run_that_one_rank_is_asked_to_stop_saves_its_step_and_resumes_with_the_same_numbers(
    policy, whole, tmp_path, asked
):
    launcher = launch_training(policy, tmp_path, "run", *SMALL, "checkpoint.every=0")
    wait_for_step(tmp_path / "run", 2)
    rank = psutil.Process(launcher.pid).children()[-1]
    rank.send_signal(getattr(signal, asked))
    output, _ = launcher.communicate(timeout=120)
    step = int(last_checkpoint(tmp_path / "run" / "checkpoints").name.removeprefix("step_"))
    assert 3 <= step < STEPS
    assert output.count(f"stopped after step {step} of {STEPS} ({asked})") == 1
    assert "exitcode  : 75" in output
    resumed = train(policy, tmp_path, "run", *SMALL)
    assert [deterministic_part(record) for record in resumed] == [deterministic_part(record) for record in whole]


def test_a_run_whose_time_is_over_asks_to_be_started_again(policy, tmp_path):
    settings = ("train.steps=3", "checkpoint.every=0", "checkpoint.every_seconds=0.001", "checkpoint.keep=9")
    arguments = training_arguments(policy, tmp_path, "run", *SMALL, *settings)
    code, output = run_script(
        QUICK_SCRIPT, [*arguments, "run.max_seconds=0.001"], ranks=2, folder=tmp_path, timeout=200
    )
    assert code == 75, output[-3000:]
    assert "stopped after step 1 of 3 (run.max_seconds = 0.001 are over); it is saved" in output
    assert [record["step"] for record in train(policy, tmp_path, "run", *SMALL, *settings)] == [0, 1, 2, 3]
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step_00000001", "step_00000002", "step_00000003"]  # every_seconds saves each of them


def test_a_run_whose_gradients_stay_nan_stops_with_good_weights_and_evidence(policy, tmp_path):
    """That it goes on when it is started again: test_faults.py."""
    script = Path(__file__).with_name("nan_gradients_script.py")
    settings = (*SMALL, "warm_start.steps=0", "checkpoint.every=0", "train.max_skipped_steps=3")
    arguments = training_arguments(policy, tmp_path, "run", *settings)
    code, output = run_script(script, arguments, ranks=2, folder=tmp_path, timeout=200)
    assert code == 3, output[-3000:]
    assert "the gradients of 4 optimizer steps in a row were NaN or infinite" in output
    assert last_checkpoint(tmp_path / "run" / "checkpoints").name == "step_00000003"  # two updates in each step
    records = read_metrics(tmp_path / "run")
    assert [record.get("train/skipped_steps") for record in records] == [None, 0.0, 2.0, 2.0]
    assert "loss" in records[1]
    assert "loss" not in records[2]
    kept = torch.load(next((tmp_path / "run" / "evidence").iterdir()), weights_only=False)
    assert kept["inputs"].rollout_log_probs.isfinite().all()


# What a synchronous save leaves when it is killed: on every push in test_checkpoints.py.
@pytest.mark.parametrize("async_save", [pytest.param("false", marks=pytest.mark.nightly), "true"])
def test_a_run_that_is_killed_in_a_save_resumes_with_the_same_numbers(policy, whole, tmp_path, async_save):
    settings = (*SMALL, "checkpoint.every=1", f"checkpoint.async_save={async_save}")
    checkpoints = tmp_path / "run" / "checkpoints"
    run = start_training(policy, tmp_path, "run", *settings)
    wait_for_step(tmp_path / "run", 2)
    torn = kill_in_a_save(run, checkpoints)
    assert last_checkpoint(checkpoints).name < torn.name
    resumed = train(policy, tmp_path, "run", *settings)
    assert [deterministic_part(record) for record in resumed] == [deterministic_part(record) for record in whole]
    assert not list(checkpoints.glob("*.incomplete"))


def kill_in_a_save(run: StartedScript, checkpoints: Path) -> Path:
    """Kill the run while a checkpoint is being written; returns what it leaves behind."""
    processes = processes_of(run)

    def suspended_in_a_save() -> Path | None:
        if not (torn := next(checkpoints.glob("step_*.incomplete"), None)):
            return None
        for process in processes:
            process.suspend()
        if torn.exists():
            return torn
        for process in processes:  # the save was faster: the next one
            process.resume()
        return None

    torn = wait_until(suspended_in_a_save, within_s=240, every_s=0.0005, what=f"a save in {checkpoints}")
    kill(run)
    return torn
