"""The example script end to end on two processes (TP=2, EP=2), in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dppo.launch.report.command import main as report
from tests.forked_ranks import run_script
from tests.metric_names import STEP_METRICS
from tests.training.tiny_runs import MISMATCH, ROOT, SCRIPT, train, training_arguments, write_tiny_policy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = (
    "warm_start.steps=5",
    "train.steps=4",
    "rollout.prompts_per_step=4",
    "eval.prompts=8",
    "eval.every=2",
    "checkpoint.every=2",
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_tiny_policy(tmp_path_factory.mktemp("policy"))


def test_a_run_writes_its_folder_and_every_documented_metric(policy, tmp_path):
    records = train(policy, tmp_path, "run", *SMALL, "checkpoint.export_hf=true", script=SCRIPT)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert set(STEP_METRICS) <= {name for record in records for name in record}
    assert "eval/accuracy" in records[0]
    assert "eval/accuracy" in records[4]
    assert max(record["mismatch/abs_log_ratio"] for record in records[1:]) < MISMATCH
    run = tmp_path / "run"
    files = {"config.yaml", "samples.jsonl", "distributions.jsonl", "checkpoints", "tensorboard", "hf"}
    assert {path.name for path in run.iterdir()} >= files
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_bytes().splitlines()]
    traced = [sample for sample in samples if "trace" in sample]
    assert {sample["step"] for sample in traced} == {1, 4}  # the first and the last step
    for sample in traced:
        assert "".join(sample["trace"]["text"]) == sample["response"]
        assert len(sample["trace"]["weight"]) == sample["tokens"]
    assert report([str(run), "--output", str(tmp_path / "report.html")]) == 0
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000002", "step_00000004"]
    assert exported(run / "hf").keys()


def exported(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_finished_run_that_is_continued_exports_its_last_weights(policy, tmp_path):
    settings = (*SMALL, "warm_start.steps=0", "checkpoint.export_hf=true")
    train(policy, tmp_path, "run", *settings, "train.steps=1")
    run = tmp_path / "run"
    first = exported(run / "hf")
    records = train(policy, tmp_path, "run", *settings, "train.steps=2")
    assert [record["step"] for record in records] == [0, 1, 2]
    arguments = ["to-hf", str(run / "checkpoints" / "step_00000002"), str(tmp_path / "last")]
    script = ROOT / "tools" / "convert_checkpoint.py"
    code, output = run_script(script, arguments, ranks=1, folder=tmp_path, timeout=200)
    assert code == 0, output
    last = exported(tmp_path / "last")
    second = exported(run / "hf")
    assert first.keys() == second.keys() == last.keys()
    assert all(torch.equal(second[name], last[name]) for name in last)
    assert not all(torch.equal(second[name], first[name]) for name in last)
    assert not [path.name for path in run.iterdir() if path.name.startswith("hf.")]


TOPK_KL = ("algorithm.loss.divergence=topk_kl", "algorithm.loss.direction=predictive", "algorithm.topk=5")
BOUND = "logging.improvement_bound=true"
EXACT_TV = ("algorithm.loss.divergence=exact_tv", "algorithm.loss.entropy_coef=0.01", "train.batching=packed")
PACKED_AND_FUSED = ("train.batching=packed", "train.fused_linear=true")
SMOOTH = ("algorithm.loss.trust_region=smooth", "algorithm.advantage=rloo")
RECOMPUTED = ("algorithm.anchor=recomputed", "algorithm.loss.aggregation=seq_mean_token_mean", "warm_start.steps=0")
PENALTY = ("algorithm.loss.kl_coef=0.1", "warm_start.steps=0")
REPLAY = ("algorithm.routing_replay=true", "model.recompute.granularity=full")


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((*TOPK_KL, *PACKED_AND_FUSED, *PENALTY), id="topk_kl and penalty"),
        pytest.param((*EXACT_TV, "algorithm.advantage=rloo", BOUND), id="exact_tv, rloo and the improvement bound"),
        pytest.param((*REPLAY, *PACKED_AND_FUSED, *RECOMPUTED, *SMOOTH[:1]), id="replay, recomputed anchor and smooth"),
        # Each alone.
        pytest.param((*TOPK_KL, *PACKED_AND_FUSED), id="topk_kl", marks=pytest.mark.nightly),
        pytest.param(EXACT_TV, id="exact_tv", marks=pytest.mark.nightly),
        pytest.param(SMOOTH, id="smooth", marks=pytest.mark.nightly),
        pytest.param(RECOMPUTED, id="recomputed anchor", marks=pytest.mark.nightly),
        pytest.param((*PENALTY, "algorithm.loss.divergence=binary_kl"), id="penalty", marks=pytest.mark.nightly),
        pytest.param((*REPLAY, *PACKED_AND_FUSED), id="replay", marks=pytest.mark.nightly),
    ],
)
def test_every_kind_of_divergence_anchor_and_penalty_trains(policy, tmp_path, overrides):
    records = train(policy, tmp_path, "run", *SMALL, *overrides, "train.steps=2")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert max(record["mismatch/abs_log_ratio"] for record in records[1:]) < MISMATCH
    assert max(record["grad_norm"] for record in records[1:]) < 1e3
    for record in records[1:]:
        if BOUND in overrides:
            assert record["bound/surrogate"] - record["bound/penalty"] == pytest.approx(record["bound/improvement"])
            assert (
                min(record["bound/penalty"], record["bound/penalty_quadratic"]) > 0
            )  # the second update is off-policy
        else:
            assert not [name for name in record if name.startswith("bound/")]


ONE_RANK = ("parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=1")
ONE_STEP = (*SMALL, "train.steps=1", "eval.temperature=0", BOUND)


@pytest.fixture(scope="module")
def one_step_of_tp2_ep2(policy, tmp_path_factory):
    return train(policy, tmp_path_factory.mktemp("runs"), "tp2_ep2", *ONE_STEP)


@pytest.mark.parametrize(
    "overrides",
    [
        # Experts spread over the replicas: on every push in tests/layouts (parity, and the embedded engine).
        pytest.param(("parallel.tensor_model_parallel_size=1",), id="dp2_ep2", marks=pytest.mark.nightly),
        pytest.param(
            (
                *ONE_RANK,
                "parallel.use_distributed_optimizer=true",
                "train.batching=packed",
                "checkpoint.async_save=true",
            ),
            id="dp2_sharded_optimizer_packed",
        ),
        pytest.param((*ONE_RANK, "parallel.pipeline_model_parallel_size=2", "train.micro_batch_size=8"), id="pp2"),
        pytest.param(
            (*ONE_RANK, "parallel.context_parallel_size=2", "train.batching=packed", "algorithm.routing_replay=true"),
            id="cp2_packed",
        ),
    ],
)
def test_other_layouts_learn_the_same_from_the_same_first_batch(policy, tmp_path, one_step_of_tp2_ep2, overrides):
    """The supervised phase sees the same examples in every layout, so the policies it leaves behind must agree."""
    reference, records = one_step_of_tp2_ep2, train(policy, tmp_path, "other", *ONE_STEP, *overrides)
    assert records[0]["eval/reward_mean"] == pytest.approx(reference[0]["eval/reward_mean"], abs=1e-6)
    assert records[1]["mismatch/abs_log_ratio"] < MISMATCH
    # How much moves between its updates depends on how a layout divides the batch among them.
    assert records[1]["bound/penalty"] > 0
    assert records[1]["bound/surrogate"] - records[1]["bound/penalty"] == pytest.approx(records[1]["bound/improvement"])


# Two stages: log-probs of a reference policy travel back from the last one, and so do metrics; routing travels with samples.
MUCH_TRAVELS = (
    *SMALL,
    "algorithm.routing_replay=true",
    "algorithm.loss.kl_coef=0.01",
    "warm_start.steps=0",
    "train.steps=2",
)


def test_nothing_is_pickled_for_other_ranks_between_samples_and_weights(policy, tmp_path):
    layout = ("parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=1")
    for stages in ("parallel.pipeline_model_parallel_size=2", "parallel.pipeline_model_parallel_size=1"):
        arguments = training_arguments(policy, tmp_path, stages, *MUCH_TRAVELS, *layout, stages)
        script = Path(__file__).with_name("no_pickles_script.py")
        code, output = run_script(script, arguments, ranks=2, folder=tmp_path, timeout=200)
        assert code == 0, output[-3000:]
