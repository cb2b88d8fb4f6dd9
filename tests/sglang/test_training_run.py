"""The trainer with a real SGLang server: TP=2 and EP=2 in training, weights broadcast and verified after every update."""

from __future__ import annotations

import psutil
import pytest

from tests.training.tiny_runs import train, write_tiny_policy

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("loss", ["binary_tv", "topk_kl"])
def test_server_and_policy_agree_before_the_first_update_of_every_batch(tmp_path, loss):
    policy = write_tiny_policy(tmp_path / "policy")
    records = train(
        policy,
        tmp_path,
        "run",
        "rollout.engine=sglang",
        f"algorithm.loss.divergence={loss}",
        "algorithm.topk=5",
        "warm_start.steps=30",
        "train.steps=3",
        "rollout.prompts_per_step=4",
        "eval.prompts=8",
        "checkpoint.every=0",
        timeout=500,
    )
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    # Server and policy compute the same fp32 network with different kernels; stale or wrong weights cost 1e-2 and more.
    assert all(record["mismatch/abs_log_ratio"] < 1e-4 for record in records[1:])
    assert all(record["rollout/staleness_max"] == 0 for record in records[1:])
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert left == []
