"""The trainer with a real SGLang server: TP=2 and EP=2 in training, weights broadcast and verified after every update."""

from __future__ import annotations

import psutil
import pytest

from megatron_dppo.rollout.sglang.server import SGLangServer, prepare_served_folder
from megatron_dppo.rollout.sglang.transport import Transport
from tests.rollout.engine_contract import LOG_PROB_TOLERANCE
from tests.rollout.sglang.conftest import server_config
from tests.training.tiny_runs import start_training, train, wait_for_step, write_tiny_policy

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = (
    "rollout.engine=sglang",
    "warm_start.steps=5",
    "rollout.prompts_per_step=4",
    "eval.prompts=8",
    "checkpoint.every=0",
)


@pytest.mark.parametrize("loss", ["binary_tv", "topk_kl"])
def test_server_and_policy_agree_before_the_first_update_of_every_batch(tmp_path, loss):
    policy = write_tiny_policy(tmp_path / "policy")
    records = train(
        policy,
        tmp_path,
        "run",
        *SMALL,
        f"algorithm.loss.divergence={loss}",
        "algorithm.topk=5",
        "train.steps=3",
        timeout=500,
    )
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    # Server and policy compute the same fp32 network with different kernels; no single log-prob may differ by more than the
    # contract's tolerance (tests/rollout/engine_contract.py), so their mean does not. Stale or wrong weights cost 1e-2.
    assert max(record["mismatch/abs_log_ratio"] for record in records[1:]) < LOG_PROB_TOLERANCE
    assert all(record["rollout/staleness_max"] == 0 for record in records[1:])
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert left == []


def test_training_without_a_server_left_stops_with_a_checkpoint_and_resumes(tmp_path):
    """An attached server is not the trainer's to restart: when it dies, what was trained must not be lost."""
    policy = write_tiny_policy(tmp_path / "policy")
    config = server_config()
    server = SGLangServer(config, prepare_served_folder(policy, tmp_path / "served"), "float32", tmp_path, 0)
    transport = Transport()
    try:
        server.start()
        server.wait_until_ready(transport)
        attached = (*SMALL, f"rollout.sglang.urls=[{server.url}]", "rollout.sglang.max_attempts=2", "train.steps=1000")
        process = start_training(policy, tmp_path, "run", *attached)
        wait_for_step(tmp_path / "run", 2)
    finally:
        server.close()
        transport.close()
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    saved = int(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1].name.removeprefix("step_"))
    assert f"step {saved} is saved in" in output
    records = train(policy, tmp_path, "run", *SMALL, f"train.steps={saved + 1}", timeout=400)
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps))
    # A step whose weights no server could be given any more is in the checkpoint, but was not logged.
    assert set(range(saved + 2)) - set(steps) <= {saved}
