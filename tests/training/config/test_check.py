"""What cannot work is refused before anything is built, in one message that names the key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.training.config.check import check_config
from megatron_dppo.training.config.load import load_config
from tests.models.published_configs import QWEN3_30B_A3B
from tests.models.tiny_policies import tiny_hf_config

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "examples" / "conf" / "quickstart.yaml"
ONE_RANK = ("parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=1")
INTERLEAVED = ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2")


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["rollout.engine=vllm"], 2, r"rollout\.engine must be one of embedded, sglang"),
        (["parallel.tensor_model_parallel_size=3"], 6, "num_attention_heads"),
        ([], 3, "does not divide the 3 ranks"),
        (["rollout.max_response_tokens=100000"], 2, "positions"),
        (["algorithm.loss.divergence=topk_kl", "algorithm.topk=0"], 2, r"algorithm\.topk"),
        (["algorithm.loss.divergence=topk_kl", "algorithm.topk=100000"], 2, r"algorithm\.topk=100000"),
        (
            ["algorithm.loss.divergence=topk_kl", "algorithm.topk=100000", "rollout.engine=sglang"],
            2,
            r"algorithm\.topk=100000",
        ),
        (["algorithm.loss.divergence=topk_kl", "algorithm.anchor=recomputed"], 2, "anchor=recomputed"),
        (["algorithm.loss.kl_coef=0.1"], 2, "kl_coef with warm_start"),
        (["train.updates_per_rollout=3"], 2, r"updates_per_rollout=3 does not divide"),
        (["rollout.samples_per_prompt=1"], 2, "samples_per_prompt must be at least 2"),
        (["rollout.prompts_per_step=0"], 2, "prompts_per_step must be at least 1"),
        (["train.optimizer.lr=0"], 2, r"train\.optimizer: lr must be positive"),
        (["train.optimizer.lr_decay_style=step"], 2, "lr_decay_style"),
        (["tasks.eval=[]"], 2, r"tasks\.train and tasks\.eval"),
        (["rollout.sglang.verify=maybe"], 2, "verify"),
        (["train.batching=sorted"], 2, r"train\.batching must be one of padded, packed"),
        (
            ["train.batching=packed", "train.tokens_per_micro_batch=75"],
            2,
            "tokens_per_micro_batch=75 is less than .* 76",
        ),
        (["train.kernel_backend=rocm"], 2, r"train\.kernel_backend must be one of auto, cuda, cpu, torch"),
        (["train.fused_linear=true", "algorithm.loss.divergence=exact_kl"], 2, "fused_linear never makes"),
        ([*ONE_RANK, "parallel.pipeline_model_parallel_size=2", "train.micro_batch_size=100"], 2, "does not divide"),
        (
            [*ONE_RANK, *INTERLEAVED, "train.micro_batch_size=128"],
            2,
            r"the samples of one optimizer step are 1 micro-batches .* multiple of the 2 pipeline stages",
        ),
        ([*ONE_RANK, *INTERLEAVED, "parallel.virtual_pipeline_model_parallel_size=3"], 2, "num_hidden_layers"),
    ],
)
def test_what_cannot_work_is_refused(overrides, world_size, message):
    config = load_config(QUICKSTART, overrides)
    with pytest.raises(ConfigError, match=message):
        check_config(config, tiny_hf_config("qwen3_moe", num_hidden_layers=4), world_size)


def test_a_dense_policy_has_no_routing_to_replay():
    config = load_config(QUICKSTART, ["parallel.expert_model_parallel_size=1", "algorithm.routing_replay=true"])
    with pytest.raises(ConfigError, match="routing_replay=true, but a qwen3 model"):
        check_config(config, tiny_hf_config("qwen3"), 2)


def test_kernels_that_are_not_there_are_not_replaced_in_silence(monkeypatch):
    report = {"torch": "available", "cpu": "available", "cuda": "compiled in, but torch sees no CUDA device"}
    monkeypatch.setattr("megatron_dppo.training.config.check.backend_report", lambda: report)
    check_config(load_config(QUICKSTART, ["train.kernel_backend=cpu"]), tiny_hf_config("qwen3_moe"), 2)
    with pytest.raises(ConfigError, match=r"train\.kernel_backend=cuda cannot be used here: compiled in"):
        check_config(load_config(QUICKSTART, ["train.kernel_backend=cuda"]), tiny_hf_config("qwen3_moe"), 2)


def test_packed_batches_have_no_condition_on_counts():
    packed = ["train.batching=packed", "train.micro_batch_size=100"]
    config = load_config(QUICKSTART, [*ONE_RANK, *INTERLEAVED, *packed])
    check_config(config, tiny_hf_config("qwen3_moe", num_hidden_layers=4), 2)


def test_the_quick_start_itself_is_fine():
    check_config(load_config(QUICKSTART), tiny_hf_config("qwen3_moe"), 2)


def test_the_h100_recipe_fits_its_model_and_whole_nodes():
    config = load_config(
        ROOT / "examples" / "conf" / "qwen3_30b_a3b.yaml", ["rollout.sglang.urls=[http://serving:30000]"]
    )
    hf_config = load_hf_config(QWEN3_30B_A3B)  # tests/models/test_build.py builds it without weights
    for world_size in (8, 16, 32):
        check_config(config, hf_config, world_size)
    with pytest.raises(ConfigError, match="does not divide the 12 ranks"):
        check_config(config, hf_config, world_size=12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=nowhere"], "model.path"),
        (["train.step=3"], "did you mean `train.steps`"),
        (["tasks.train=[{name: mine, kind: jsonl, path: broken.jsonl}]"], "broken.jsonl"),
    ],
)
def test_a_bad_start_says_one_thing_and_exits_with_2(tmp_path, overrides, message):
    from tests.training.tiny_runs import write_tiny_policy

    write_tiny_policy(tmp_path / "policy")
    (tmp_path / "broken.jsonl").write_text('{"question": "1 + 1", "answer": "#### 2"}\n{"question": \n')
    command = [
        sys.executable,
        str(ROOT / "examples" / "pretrain_dppo.py"),
        "--config",
        str(QUICKSTART),
        "--world-size",
        "2",
    ]
    arguments = [f"model.path={tmp_path / 'policy'}", f"run.root={tmp_path / 'runs'}", *overrides]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
