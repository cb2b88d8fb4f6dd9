"""A job on this machine, started by one command: it trains, saves when it is asked to, goes on, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dppo.launch import agent
from megatron_dppo.launch.attempt import Attempt
from tests.launch.launched_run import ONE_RANK, LaunchedRun
from tests.rollout.sglang.stand_in_server import stand_in_interpreter
from tests.training.tiny_runs import deterministic_part, read_metrics, train, wait_for_step, write_tiny_policy
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
    "checkpoint.every=0",
)
TWO_NODES = ("launch.trainer_nodes=2", "launch.processes_per_node=1")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where what is started has temporary files. Not in pytest's folder: a socket's path has 107 characters."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def test_torchruns_folder_goes_with_the_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def run(options: Namespace) -> None:
        seen.append(Path(options.log_dir))
        assert seen[0].is_dir()

    monkeypatch.setattr(agent, "run_torchrun", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("MEGATRON_DPPO_AGENT", "")
    assert agent.Agent(Attempt(tmp_path)).run(["-m", "megatron_dppo.launch.rank"]) == 0
    assert not seen[0].exists()


def test_a_node_that_is_asked_to_stop_has_the_run_save_and_go_on_with_the_same_numbers(policy, tmp_path) -> None:
    """Two agents over the loopback device, one rank each; what torchrun would do is to kill the ranks after 30 s."""
    launched = LaunchedRun(policy, tmp_path, *SMALL, *TWO_NODES)
    wait_for_step(launched.run, 2)
    launched.processes("megatron_dppo.launch.agent --nodes 2 --processes 1 --node-rank 1")[0].send_signal(
        signal.SIGTERM
    )
    code, output = launched.ends(within_s=400)
    assert code == 0, output
    assert output.count("the run has saved and goes on: start 2") == 1
    assert "resuming from" in output
    whole = train(policy, tmp_path, "whole", *SMALL)  # with nobody between it and its ranks
    assert [deterministic_part(r) for r in read_metrics(launched.run)] == [deterministic_part(r) for r in whole]
    assert launched.left() == []
    logs = sorted(path.name for path in launched.run.glob("launch/local-*/start-2/*.log"))
    assert logs == ["trainer-0.log", "trainer-1.log"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.nightly)])
def test_nothing_is_left_of_a_job_that_is_ended(policy, tmp_path, temporary, number) -> None:
    """While its trainer waits for a server that never becomes ready."""
    python = stand_in_interpreter(tmp_path, before="sleep 1000")
    serving = ("rollout.engine=sglang", "launch.server_nodes=1", f"rollout.sglang.python={python}")
    launched = LaunchedRun(policy, tmp_path, *SMALL, *ONE_RANK, *serving)
    launched.wait_for("sglang.launch_server")
    launched.wait_for("megatron_dppo.launch.rank")
    wait_until(lambda: "servers" in launched.log.read_text(), within_s=120, what="the trainer waits for servers")
    os.kill(launched.process.pid, number)
    code, output = launched.ends(within_s=60)
    assert code == (75 if number == signal.SIGTERM else -number), output
    wait_until(lambda: not launched.left(), within_s=60, what="everything that was started has ended")
    assert launched.processes("") == []

    def left() -> list[str]:
        return [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]

    wait_until(lambda: left() == [], within_s=20, what=f"{left()} go")


def test_input_that_the_ranks_refuse_ends_the_job_with_their_code_and_its_servers(policy, tmp_path) -> None:
    python = stand_in_interpreter(tmp_path)
    serving = ("rollout.engine=sglang", "launch.server_nodes=1", f"rollout.sglang.python={python}")
    launched = LaunchedRun(policy, tmp_path, *SMALL, *ONE_RANK, *serving, "run.device=cuda")
    code, output = launched.ends(within_s=200)
    assert code == 2, output
    assert "torch sees no GPU" in output
    assert launched.left() == []


@pytest.mark.sglang
@pytest.mark.nightly
def test_a_run_with_a_real_server_survives_what_a_scheduler_does_to_it(policy, tmp_path) -> None:
    """A SIGTERM to a node has it start again; one to the command ends it, saved, and the command goes on from there.

    Responses are drawn from the seeds of their requests, and servers batch them as they come: sums in another order, 1e-6.
    """
    served = ("rollout.engine=sglang", "rollout.sglang.deterministic=true", "launch.server_nodes=1")
    settings = (*SMALL, *TWO_NODES, *served)
    (tmp_path / "whole").mkdir()
    whole = LaunchedRun(policy, tmp_path / "whole", *settings)
    code, output = whole.ends(within_s=400)
    assert code == 0, output
    launched = LaunchedRun(policy, tmp_path, *settings)
    wait_for_step(launched.run, 2)
    launched.processes("megatron_dppo.launch.agent --nodes 2 --processes 1 --node-rank 1")[0].send_signal(
        signal.SIGTERM
    )
    wait_until(lambda: "goes on: start 2" in launched.log.read_text(), within_s=200, what="it starts again")
    wait_for_step(launched.run, 5)
    launched.process.send_signal(signal.SIGTERM)
    code, output = launched.ends(within_s=200)
    assert code == 75, output
    assert launched.left() == []
    code, output = (again := LaunchedRun(policy, tmp_path, *settings)).ends(within_s=400)
    assert code == 0, output
    assert again.left() == []
    compared = ("step", "reward/mean", "rollout/length_mean", "loss", "entropy", "eval/accuracy")
    assert len(read_metrics(launched.run)) == STEPS + 1
    for record, expected in zip(read_metrics(launched.run), read_metrics(whole.run), strict=True):
        for name in record.keys() & set(compared):
            assert record[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (record["step"], name)
