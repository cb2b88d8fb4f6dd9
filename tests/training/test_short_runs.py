"""The example script end to end on two processes (TP=2, EP=2), in small."""

from __future__ import annotations

import os
import signal

import pytest
from safetensors.torch import load_file

from tests.training.tiny_runs import start_training, train, wait_for_step, write_tiny_policy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = (
    "warm_start.steps=30",
    "train.steps=4",
    "rollout.prompts_per_step=4",
    "eval.prompts=8",
    "eval.every=2",
    "checkpoint.every=2",
)
DOCUMENTED = (
    "reward/mean",
    "reward/std",
    "loss",
    "grad_norm",
    "entropy",
    "dppo/mask_fraction",
    "dppo/mask_fraction_pos",
    "dppo/mask_fraction_neg",
    "dppo/divergence_mean",
    "dppo/divergence_p99",
    "dppo/divergence_max",
    "dppo/bad_update_fraction",
    "dppo/ppo_would_clip_fraction",
    "mismatch/abs_log_ratio",
    "mismatch/kl_k3",
    "rollout/length_mean",
    "rollout/staleness_max",
    "time/rollout_s",
    "time/update_s",
    "time/sync_s",
    "throughput/tokens_per_s",
    "memory/peak_bytes",
)
# Wall-clock figures differ between runs; everything else is a function of the seed.
TIMED = ("time/", "throughput/", "memory/")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_tiny_policy(tmp_path_factory.mktemp("policy"))


def deterministic_part(record: dict) -> dict:
    return {name: value for name, value in record.items() if not name.startswith(TIMED)}


def test_a_run_writes_its_folder_and_every_documented_metric(policy, tmp_path):
    records = train(policy, tmp_path, "run", *SMALL, "checkpoint.export_hf=true")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    reported = {name for record in records for name in record}
    assert set(DOCUMENTED) <= reported
    assert "eval/accuracy" in records[0]
    assert "eval/accuracy" in records[4]
    # On-policy, engine and policy compute the same fp32 network: anything above is a seam that does not fit.
    assert all(record["mismatch/abs_log_ratio"] < 1e-4 for record in records[1:])
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "samples.jsonl", "checkpoints", "tensorboard", "hf"}
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000002", "step_00000004"]
    assert load_file(next((run / "hf").glob("*.safetensors")))


def test_a_run_that_is_killed_resumes_with_the_same_numbers(policy, tmp_path):
    whole = train(policy, tmp_path, "whole", *SMALL)
    process = start_training(policy, tmp_path, "killed", *SMALL)
    wait_for_step(tmp_path / "killed", 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = train(policy, tmp_path, "killed", *SMALL)
    assert [deterministic_part(r) for r in resumed] == [deterministic_part(r) for r in whole]


@pytest.mark.parametrize(
    "overrides",
    [
        ("algorithm.loss.divergence=topk_kl", "algorithm.loss.direction=predictive", "algorithm.topk=5"),
        ("algorithm.loss.divergence=exact_tv", "algorithm.loss.entropy_coef=0.01"),
        ("algorithm.loss.trust_region=smooth", "algorithm.advantage=rloo"),
        ("algorithm.anchor=recomputed", "algorithm.loss.aggregation=seq_mean_token_mean", "warm_start.steps=0"),
        ("algorithm.loss.kl_coef=0.1", "warm_start.steps=0", "algorithm.loss.divergence=binary_kl"),
    ],
    ids=lambda overrides: overrides[0].split("=")[-1],
)
def test_every_kind_of_divergence_anchor_and_penalty_trains(policy, tmp_path, overrides):
    records = train(policy, tmp_path, "run", *SMALL, *overrides, "train.steps=2")
    assert all(record["mismatch/abs_log_ratio"] < 1e-4 for record in records[1:])
    assert all(record["grad_norm"] < 1e3 for record in records[1:])


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.expert_model_parallel_size=1", "parallel.tensor_model_parallel_size=1"),  # DP 2
        ("parallel.tensor_model_parallel_size=1",),  # DP 2, experts spread over the replicas
        (
            "parallel.tensor_model_parallel_size=1",
            "parallel.expert_model_parallel_size=1",
            "parallel.pipeline_model_parallel_size=2",
            "train.micro_batch_size=8",
        ),
    ],
    ids=["dp2", "dp2_ep2", "pp2"],
)
def test_other_layouts_learn_the_same_from_the_same_first_batch(policy, tmp_path, overrides):
    """The supervised phase sees the same examples in every layout, so the policies it leaves behind must agree."""
    reference = train(policy, tmp_path, "tp2_ep2", *SMALL, "train.steps=1", "eval.temperature=0")
    records = train(policy, tmp_path, "other", *SMALL, "train.steps=1", "eval.temperature=0", *overrides)
    assert records[0]["eval/reward_mean"] == pytest.approx(reference[0]["eval/reward_mean"], abs=1e-6)
    assert records[1]["mismatch/abs_log_ratio"] < 1e-4
