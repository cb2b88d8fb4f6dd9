"""What cannot work is refused before anything is built, in one message that names the key."""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from pathlib import Path

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.training.config.check import check_config
from megatron_dppo.training.config.load import load_config
from tests.forked_ranks import run_script
from tests.models.published_configs import QWEN3_30B_A3B
from tests.models.tiny_policies import tiny_hf_config

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "examples" / "conf" / "quickstart.yaml"
ONE_RANK = ("parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=1")
SGLANG = ("rollout.engine=sglang", f"rollout.sglang.python={sys.executable}")
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
        (["logging.improvement_bound=true", "algorithm.advantage=grpo"], 2, "improvement_bound compares"),
        (["logging.improvement_bound=true", "algorithm.anchor=recomputed"], 2, "improvement_bound compares"),
        (["algorithm.loss.kl_coef=0.1"], 2, "kl_coef with warm_start"),
        (["train.updates_per_rollout=1000"], 2, r"updates_per_rollout=1000 is more than the \d+ samples"),
        ([*SGLANG, "rollout.embedded.weight_rounding=bf16"], 2, r"rollout\.engine=sglang generates with its own"),
        (["rollout.log_prob_floor=0"], 2, r"log_prob_floor must be below 0"),
        (["rollout.max_failed_share=1"], 2, r"max_failed_share must be below 1"),
        (["rollout.samples_per_prompt=1"], 2, "samples_per_prompt must be at least 2"),
        (["rollout.prompts_per_step=0"], 2, "prompts_per_step must be at least 1"),
        (["train.optimizer.lr=0"], 2, r"train\.optimizer\.lr must be above 0"),
        (["train.optimizer.adam_beta1=1.5"], 2, r"train\.optimizer\.adam_beta1 must be below 1"),
        (["warm_start.optimizer.adam_beta2=1"], 2, r"warm_start\.optimizer\.adam_beta2 must be below 1"),
        (["train.optimizer.min_lr=1"], 2, "min_lr <= lr"),
        (["tasks.score_timeout_s=0"], 2, r"tasks\.score_timeout_s must be above 0"),
        (["logging.prometheus_port=70000"], 2, "prometheus_port=70000 is no port"),
        (["logging.wandb.mode=sometimes"], 2, r"logging\.wandb\.mode must be one of online, offline"),
        (["logging.alarms.window=0"], 2, r"logging\.alarms\.window must be at least 1"),
        (["run.seed=4294967296"], 2, r"run\.seed must be at most"),
        (["rollout.engine=sglang", "rollout.sglang.python=no-such-python"], 2, "no-such-python is no program"),
        (["rollout.sglang.urls=[http://a:1,http://a:1]"], 2, "listed twice"),
        (
            ["tasks.score_timeout_s=20000"],
            2,
            r"tasks\.score_timeout_s = 20000 s must be below rollout\.exchange_timeout_s",
        ),
        ([*SGLANG, "rollout.sglang.generate_timeout_s=14400"], 2, r"generate_timeout_s = .* below rollout\.exchange"),
        (
            [*SGLANG, "rollout.sglang.startup_timeout_s=13800"],
            2,
            r"sync_timeout_s = 14400 s must be below rollout\.exch",
        ),
        (
            [*SGLANG, "parallel.collective_timeout_s=600"],
            2,
            r"sync_timeout_s = 600 s must be below parallel\.collective",
        ),
        (["train.optimizer.lr_decay_style=step"], 2, "lr_decay_style"),
        (["tasks.eval=[]"], 2, r"tasks\.train and tasks\.eval"),
        (["rollout.sglang.verify=maybe"], 2, "verify"),
        (
            [*SGLANG, "model.dtype=bf16", "model.fp32_head=false", "rollout.sglang.dtype=float32"],
            2,
            r"sglang\.dtype=float32 leaves .* fp32, and model\.fp32_head=false rounds .*: set model\.fp32_head=true",
        ),
        (["train.batching=sorted"], 2, r"train\.batching must be one of padded, packed"),
        (
            ["train.batching=packed", "train.tokens_per_micro_batch=75"],
            2,
            "tokens_per_micro_batch=75 is less than .* 76",
        ),
        (["train.kernel_backend=rocm"], 2, r"train\.kernel_backend must be one of auto, cuda, cpu, torch"),
        (["train.fused_linear=true", "algorithm.loss.divergence=exact_kl"], 2, "fused_linear never makes"),
        (
            ["train.deterministic=layout", "algorithm.loss.divergence=exact_kl"],
            2,
            "train.deterministic=layout does not cover",
        ),
        (["train.deterministic=yes"], 2, "train.deterministic must be one of off, layout"),
        ([*ONE_RANK, *INTERLEAVED, "parallel.virtual_pipeline_model_parallel_size=3"], 2, "num_hidden_layers"),
    ],
)
def test_what_cannot_work_is_refused(overrides, world_size, message):
    config = load_config(QUICKSTART, overrides)
    with pytest.raises(ConfigError, match=message):
        check_config(config, tiny_hf_config("qwen3_moe", num_hidden_layers=4), world_size)


# Those with a meaning below 0, or that are checked where the tasks are built.
FREE_NUMBERS = {"tasks.train[0].seed", "tasks.eval[0].seed", "tasks.train[0].size", "tasks.eval[0].size"}
FREE_NUMBERS |= {"tasks.train[0].weight", "tasks.eval[0].weight"}
FREE_NUMBERS |= {"rollout.log_prob_floor"}


def number_options(tree, prefix: str = "") -> list[str]:
    """The names of all options of a configuration that are numbers, or may be."""
    found = []
    for name, hint in typing.get_type_hints(type(tree)).items():
        value, key = getattr(tree, name), prefix + name
        kinds = {hint, *typing.get_args(hint)}
        if dataclasses.is_dataclass(value):
            found += number_options(value, f"{key}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            found += number_options(value[0], f"{key}[0].")
        elif kinds & {int, float}:
            found.append(key)
    return found


ALL_NUMBERS = number_options(load_config(QUICKSTART))


def test_the_numbers_of_the_configuration_are_found():
    assert {"run.seed", "train.optimizer.adam_eps", "rollout.sglang.base_gpu_id"} <= {*ALL_NUMBERS}
    assert len(ALL_NUMBERS) > 60
    assert {*ALL_NUMBERS} >= FREE_NUMBERS


@pytest.mark.parametrize("key", [key for key in ALL_NUMBERS if key not in FREE_NUMBERS])
def test_no_number_goes_unread_by_the_checks(key):
    """A value that no check reads fails somewhere in a run, or, worse, does not."""
    with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
        check_config(load_config(QUICKSTART, [f"{key}=-1"]), tiny_hf_config("qwen3_moe", num_hidden_layers=4), 2)


@pytest.mark.parametrize("key", ["rollout.sglang.sync_timeout_s", "tasks.train[0].weight", "train.optimizer.lr"])
@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_numbers_are_finite(key, value):
    with pytest.raises(ConfigError, match=rf"{re.escape(key)} must be a finite number"):
        check_config(load_config(QUICKSTART, [f"{key}={value}"]), tiny_hf_config("qwen3_moe", num_hidden_layers=4), 2)


def test_a_dense_policy_has_no_routing_to_replay():
    config = load_config(QUICKSTART, ["parallel.expert_model_parallel_size=1", "algorithm.routing_replay=true"])
    with pytest.raises(ConfigError, match="routing_replay=true, but a qwen3 model"):
        check_config(config, tiny_hf_config("qwen3"), 2)


def test_a_dense_policy_has_no_routers_to_round():
    overrides = ["parallel.expert_model_parallel_size=1", "rollout.embedded.router_rounding=int8"]
    with pytest.raises(ConfigError, match="router_rounding=int8, but a qwen3 model has no routers"):
        check_config(load_config(QUICKSTART, overrides), tiny_hf_config("qwen3"), 2)


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


def test_time_outs_of_an_engine_that_is_off_are_not_compared():
    overrides = ["rollout.sglang.generate_timeout_s=20000", "parallel.collective_timeout_s=60"]
    check_config(load_config(QUICKSTART, overrides), tiny_hf_config("qwen3_moe", num_hidden_layers=4), 2)


def test_the_quick_start_itself_is_fine():
    check_config(load_config(QUICKSTART), tiny_hf_config("qwen3_moe"), 2)


def test_the_h100_recipe_fits_its_model_and_whole_nodes():
    config = load_config(
        ROOT / "examples" / "conf" / "qwen3_30b_a3b.yaml", ["rollout.sglang.urls=[http://serving:30000]"]
    )
    hf_config = load_hf_config(QWEN3_30B_A3B)  # tests/models/test_build.py builds it without weights
    for world_size in (8, 16, 64, 128, 256, 512, 1024):
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
        (["run.root=broken.jsonl", "--check"], "broken.jsonl is a file"),
    ],
)
def test_a_bad_start_says_one_thing_and_exits_with_2(tmp_path, overrides, message):
    from tests.training.tiny_runs import SCRIPT, write_tiny_policy

    write_tiny_policy(tmp_path / "policy")
    (tmp_path / "broken.jsonl").write_text('{"question": "1 + 1", "answer": "#### 2"}\n{"question": \n')
    settings = [f"model.path={tmp_path / 'policy'}", f"run.root={tmp_path / 'runs'}", *overrides]
    arguments = ["--config", str(QUICKSTART), "--world-size", "2", *settings]
    code, output = run_script(SCRIPT, arguments, ranks=1, folder=tmp_path, timeout=120)
    assert code == 2, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


COLOCATED = (*SGLANG, "rollout.sglang.colocated=true")


@pytest.mark.parametrize(
    ("overrides", "environment", "message"),
    [
        (["rollout.sglang.colocated=true"], {}, r"colocated=true needs rollout\.engine=sglang, not embedded"),
        ([*COLOCATED, "rollout.sglang.urls=[http://a:1]"], {}, "colocated=true with urls"),
        ([*COLOCATED, "rollout.sglang.base_gpu_id=0"], {}, "base_gpu_id = 0 with colocated=true"),
        (COLOCATED, {"LOCAL_WORLD_SIZE": "1"}, "all ranks on one host, but 1 of 2"),
        ([*COLOCATED, "run.device=cuda"], {}, "with 2 ranks, .*num_servers = 1 servers on .* the product must be 2"),
        (
            [*COLOCATED, "run.device=cuda", "rollout.sglang.num_servers=2"],
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"},
            "expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF",
        ),
    ],
)
def test_devices_that_cannot_be_shared_are_refused(overrides, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        check_config(load_config(QUICKSTART, overrides), tiny_hf_config("qwen3_moe", num_hidden_layers=4), 2)


@pytest.mark.parametrize("overrides", [(), ("run.device=cuda", "rollout.sglang.num_servers=2")], ids=["CPU", "GPU"])
def test_devices_that_can_be_shared_are_fine(overrides, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = load_config(QUICKSTART, [*COLOCATED, *overrides])
    assert config.rollout.sglang.colocated
    check_config(config, tiny_hf_config("qwen3_moe", num_hidden_layers=4), 2)
