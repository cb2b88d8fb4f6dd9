"""The trainer with a real SGLang server: TP=2 and EP=2 in training, weights broadcast and verified after every update."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from megatron_dppo.rollout.sglang.servers.served_policy import prepare_served_folder
from megatron_dppo.rollout.sglang.servers.server import SGLangServer
from megatron_dppo.rollout.sglang.transport import Transport
from tests.rollout.engine_contract import LOG_PROB_TOLERANCE
from tests.rollout.sglang.conftest import server_config
from tests.rollout.sglang.server_faults import signal_when_they_work
from tests.training.tiny_runs import start_training, train, wait_for_step, write_tiny_policy

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = (
    "rollout.engine=sglang",
    "warm_start.steps=5",
    "rollout.prompts_per_step=4",
    "eval.prompts=8",
    "checkpoint.every=0",
)


TOPK_KL = ("algorithm.loss.divergence=topk_kl", "algorithm.topk=5")


def _assert_server_and_policy_agree(records: list[dict]) -> None:
    """Before the first update of every batch.

    Server and policy compute the same fp32 network with different kernels; no single log-prob may differ by more than the
    contract's tolerance (tests/rollout/engine_contract.py), so their mean does not. Stale or wrong weights cost 1e-2.
    """
    trained = [record for record in records if record["step"] > 0]
    assert max(record["mismatch/abs_log_ratio"] for record in trained) < LOG_PROB_TOLERANCE
    assert all(record["rollout/staleness_max"] == 0 for record in trained)


def _assert_no_server_is_left(folder: Path) -> None:
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    assert left == []


@pytest.mark.nightly  # on every push the run below, whose trainer has a server of its own at its end
@pytest.mark.parametrize("loss", [("algorithm.loss.divergence=binary_tv",), TOPK_KL], ids=["binary_tv", "topk_kl"])
def test_server_and_policy_agree_before_the_first_update_of_every_batch(tmp_path, loss):
    policy = write_tiny_policy(tmp_path / "policy")
    records = train(policy, tmp_path, "run", *SMALL, *loss, "train.steps=3", timeout=500)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    _assert_server_and_policy_agree(records)
    _assert_no_server_is_left(tmp_path)


def test_training_without_a_server_left_stops_with_a_checkpoint_and_resumes(tmp_path):
    """An attached server is not the trainer's to restart: when it dies, what was trained must not be lost.

    The run goes on with a server that a command starts for it, as on another host. Both times server and policy agree.
    """
    policy = write_tiny_policy(tmp_path / "policy")
    config = server_config()
    server = SGLangServer(config, prepare_served_folder(policy, tmp_path / "served"), "float32", tmp_path, 0)
    transport = Transport()
    try:
        server.start()
        server.wait_until_ready(transport)
        attached = (*SMALL, *TOPK_KL, f"rollout.sglang.urls=[{server.url}]", "rollout.sglang.max_attempts=2")
        run = start_training(policy, tmp_path, "run", *attached, "train.steps=1000")
        wait_for_step(tmp_path / "run", 2)
    finally:
        server.close()
        transport.close()
    codes, output = run.ends()
    assert codes == [3, 3], output[-4000:]
    saved = int(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1].name.removeprefix("step_"))
    assert f"step {saved} is saved in" in output
    launched = (*SMALL, *TOPK_KL, "rollout.sglang.launch={serve}")
    records = train(policy, tmp_path, "run", *launched, f"train.steps={saved + 2}", timeout=400)
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps))
    # A step whose weights no server could be given any more is in the checkpoint, but was not logged.
    assert set(range(saved + 3)) - set(steps) <= {saved}
    _assert_server_and_policy_agree(records)
    _assert_no_server_is_left(tmp_path)


@pytest.mark.nightly  # on every push: its parts, with servers and engines that are made up
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_run_that_is_asked_to_stop_does_not_wait_for_its_responses(tmp_path, number):
    """One rank is asked, the one that waits for the other, while a server holds everything back."""
    policy = write_tiny_policy(tmp_path / "policy")
    server = SGLangServer(server_config(), prepare_served_folder(policy, tmp_path / "served"), "float32", tmp_path, 0)
    transport = Transport()
    try:
        server.start()
        server.wait_until_ready(transport)
        attached = (*SMALL, f"rollout.sglang.urls=[{server.url}]", "rollout.sglang.control_timeout_s=5")
        run = start_training(policy, tmp_path, "run", *attached, "train.steps=1000")
        wait_for_step(tmp_path / "run", 2)
        signal_when_they_work([server], signal.SIGSTOP).join()
        os.kill(run.processes[-1].pid, number)
        codes, output = run.ends()
    finally:
        if server.pid is not None:
            os.killpg(server.pid, signal.SIGCONT)
        server.close()
        transport.close()
    assert codes == [75, 75], output[-4000:]
    assert f"({number.name} amid rollouts, which were given up); it is saved" in output
    saved = int(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1].name.removeprefix("step_"))
    assert saved >= 2
