"""Recipes of NeMo-RL and verl become ours, and nothing is lost without a word.

The records are of real recipes (tools/integrations/record_recipes.py).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dppo.cli import main
from megatron_dppo.launch.config import Recipe
from megatron_dppo.launch.import_config import nemo_rl, verl
from megatron_dppo.launch.import_config.shell_overrides import read_overrides
from megatron_dppo.launch.import_config.translation import Translation
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.training.config.check import check_config
from megatron_dppo.training.config.load import load_as
from tests.models import published_configs

RECORDS = Path(__file__).parent / "records"
NEMO_RL: dict[str, dict] = json.loads((RECORDS / "nemo_rl_recipes.json").read_text(encoding="utf-8"))
VERL: dict[str, list[str]] = json.loads((RECORDS / "verl_overrides.json").read_text(encoding="utf-8"))
CP2_R3_ASYNC = "recipes/llm/grpo-qwen3-30ba3b-10n8g-megatron-cp2-r3-async.yaml"
DPPO = "dppo_trainer/run_qwen3_30b_a3b_megatron.sh"


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NeMo-RL's folder of configurations, as far as it was recorded."""
    folder = tmp_path_factory.mktemp("configs")
    for name, tree in NEMO_RL.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder


def from_verl(folder: Path, words: list[str]) -> Translation:
    (folder / "overrides.txt").write_text("\n".join(map(shlex.quote, words)))
    return verl.translate(folder / "overrides.txt")


def as_recipe(translation: Translation, folder: Path) -> Recipe:
    (folder / "mine.yaml").write_text(translation.as_yaml("a test"))
    return load_as(Recipe, folder / "mine.yaml", ["rollout.sglang.urls=[http://a:1]", "rollout.sglang.colocated=false"])


@pytest.mark.parametrize("name", NEMO_RL)
def test_a_recipe_of_nemo_rl_loads_with_every_key_accounted_for(name: str, configs: Path, tmp_path: Path) -> None:
    translation = nemo_rl.translate(configs / name)
    as_recipe(translation, tmp_path)
    assert translation.unknown == []
    assert "anchor" in translation.differs["loss_fn"]
    assert "ppo_clip_low: 0.2" in translation.differs["loss_fn.ratio_clip_min"]


@pytest.mark.parametrize("name", VERL)
def test_overrides_of_verl_load_with_every_key_accounted_for(name: str, tmp_path: Path) -> None:
    translation = from_verl(tmp_path, VERL[name])
    as_recipe(translation, tmp_path)
    assert translation.unknown == []
    assert "anchor" in translation.differs["actor_rollout_ref.actor.policy_loss.loss_mode"]


def test_a_chain_of_nemo_rl_files_means_what_its_last_one_says(configs: Path, tmp_path: Path) -> None:
    translation = nemo_rl.translate(configs / CP2_R3_ASYNC)
    recipe = as_recipe(translation, tmp_path)
    layout = recipe.parallel
    assert (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size) == (4, 2)
    assert (layout.context_parallel_size, layout.expert_model_parallel_size) == (2, 4)
    assert (recipe.rollout.prompts_per_step, recipe.rollout.samples_per_prompt) == (16, 8)
    assert recipe.train.updates_per_rollout == 1  # 128 samples in a batch of 128
    assert (recipe.rollout.max_prompt_tokens, recipe.rollout.max_response_tokens) == (2048, 2048)
    assert (recipe.train.optimizer.lr, recipe.train.optimizer.lr_warmup_steps) == (3e-7, 13)
    assert (recipe.algorithm.routing_replay, recipe.algorithm.loss.kl_coef) == (True, 0.01)
    assert (recipe.launch.trainer_nodes, recipe.launch.server_nodes, recipe.launch.gpus_per_node) == (8, 2, 8)
    assert recipe.rollout.sglang.num_servers == 4
    assert {"grpo.async_grpo.enabled", "data"} <= translation.missing.keys()
    check_config(recipe, load_hf_config(published_configs.QWEN3_30B_A3B), 64)


def test_verls_own_example_of_dppo_is_the_paper_recipe_here(tmp_path: Path) -> None:
    from megatron_dppo.launch.recipes import load_recipe

    imported = as_recipe(from_verl(tmp_path, VERL[DPPO]), tmp_path)
    ours = load_recipe("dppo-qwen3-30b-a3b-base-4n8g-tp2ep8")
    assert imported.algorithm == ours.algorithm
    assert imported.train.optimizer == ours.train.optimizer
    assert imported.train.updates_per_rollout == ours.train.updates_per_rollout
    for name in ("prompts_per_step", "samples_per_prompt", "max_prompt_tokens", "max_response_tokens"):
        assert getattr(imported.rollout, name) == getattr(ours.rollout, name), name
    for name in ("tensor", "expert"):
        size = f"{name}_model_parallel_size"
        assert getattr(imported.parallel, size) == getattr(ours.parallel, size)


@pytest.mark.parametrize(
    ("changes", "option", "value"),
    [
        ({"policy.precision": "float32"}, "model.dtype", "fp32"),
        ({"loss_fn.token_level_loss": False}, "algorithm.loss.aggregation", "seq_mean_token_mean"),
        (
            {"grpo.normalize_rewards": False, "grpo.use_leave_one_out_baseline": False},
            "algorithm.advantage",
            "mean_baseline",
        ),
        ({"grpo.normalize_rewards": False}, "algorithm.advantage", "rloo"),
        ({"policy.sequence_packing.enabled": False}, "train.batching", "padded"),
        ({"policy.generation.colocated.enabled": True, "cluster.num_nodes": 1}, "rollout.sglang.colocated", True),
        (
            {"data.train.data_path": "/mine/a.parquet", "data.train.input_key": "q"},
            "tasks.train",
            [{"name": "a", "kind": "parquet", "path": "/mine/a.parquet", "fields": {"question": "q"}}],
        ),
        (
            {"data.train": [{"dataset_name": "one"}, {"data_path": "two.jsonl"}]},
            "tasks.train",
            [
                {"name": "one", "kind": "jsonl", "path": "data/one.jsonl"},
                {"name": "two", "kind": "jsonl", "path": "two.jsonl"},
            ],
        ),
        (
            {"data.train.dataset_name": "My Data"},
            "tasks.train",
            [{"name": "my_data", "kind": "jsonl", "path": "data/my_data.jsonl"}],
        ),
    ],
)
def test_what_a_key_of_nemo_rl_becomes(
    changes: dict[str, Any], option: str, value: Any, configs: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(_changed(configs / CP2_R3_ASYNC, changes))
    assert nemo_rl.translate(tmp_path / "mine.yaml").options[option] == value


def _changed(base: Path, changes: dict[str, Any]) -> str:
    tree: dict[str, Any] = {"defaults": str(base)}
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return yaml.safe_dump(tree)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"policy.generation.top_p": 0.9}, "policy.generation.top_p"),
        ({"policy.generation.top_k": 50}, "policy.generation.top_k"),
        ({"grpo.reward_shaping.enabled": True}, "grpo.reward_shaping.enabled"),
        ({"policy.megatron_cfg.peft.enabled": True}, "policy.megatron_cfg.peft.enabled"),
        ({"policy.hf_config_overrides": {"rope_scaling": {"factor": 4}}}, "policy.hf_config_overrides"),
        ({"policy.precision": "float16"}, "policy.precision"),
    ],
)
def test_what_nemo_rl_has_and_this_trainer_has_not_is_said(
    changes: dict[str, Any], key: str, configs: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(_changed(configs / CP2_R3_ASYNC, changes))
    assert key in nemo_rl.translate(tmp_path / "mine.yaml").missing


def test_a_section_that_overrides_replaces_the_one_before(configs: Path, tmp_path: Path) -> None:
    changes = {"policy": {"_override_": True, "model_name": "a/b"}, "grpo.new_switch": 3}
    (tmp_path / "mine.yaml").write_text(_changed(configs / CP2_R3_ASYNC, changes))
    translation = nemo_rl.translate(tmp_path / "mine.yaml")
    assert translation.options["model.path"] == "models/b"
    assert "parallel.pipeline_model_parallel_size" not in translation.options
    assert translation.unknown == ["grpo.new_switch"]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (
            ["actor_rollout_ref.actor.policy_loss.loss_mode=dppo_kl"],
            {"algorithm.loss.divergence": "binary_kl", "algorithm.loss.ratio_cap": 3.0},
        ),
        (
            ["actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"],
            {"algorithm.loss.aggregation": "seq_mean_token_mean"},
        ),
        (
            ["actor_rollout_ref.actor.ppo_mini_batch_size=64", "data.train_batch_size=256"],
            {"train.updates_per_rollout": 4},
        ),
        (["algorithm.adv_estimator=rloo"], {"algorithm.advantage": "rloo"}),
        (
            ["actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_type=mse"],
            {"algorithm.loss.kl_estimator": "k2"},
        ),
        (["trainer.save_freq=-1"], {"checkpoint.every": 0}),
        (
            ["data.train_files=['$HOME/data/gsm8k/train.parquet','/mine/b.parquet']"],
            {
                "tasks.train": [
                    {"name": "gsm8k_train", "kind": "parquet", "path": "data/gsm8k/train.parquet"},
                    {"name": "mine_b", "kind": "parquet", "path": "/mine/b.parquet"},
                ]
            },
        ),
        (["actor_rollout_ref.model.path=$MODEL"], {"model.path": ""}),
    ],
)
def test_what_an_override_of_verl_becomes(words: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    translation = from_verl(tmp_path, ["actor_rollout_ref.rollout.n=8", *words])
    assert {name: translation.options[name] for name in options} == options


SCRIPT = r"""
set -xeuo pipefail
# a.comment=1
export LENGTH=$((1024 * 2))
MODE=${MODE:-tv}
case $MODE in
    kl) DELTA=0.05 ;;
    tv)  DELTA=0.15 ;;
    *) echo "unknown: $MODE"; exit 1 ;;
esac
batch=${BATCH:-256}
MORE="
    a.more=$batch \
    a.most=2"
UNUSED="a.unused=1"
tokens=${TOKENS:-$((LENGTH + 8192))}
if [ "$MODE" = kl ]; then
    batch=1
    ARGS+=(a.conditional=1)
fi
ARGS=(
    a.path="$HOME/models/x"
    a.files="['$ROOT/train.parquet']"
    +a.added=${tokens}
)
python3 -m program \
    a.delta=${DELTA} a.batch=$batch \
    a.lr=1e-6 \
    a.none=null ++a.list=[1,2] $MORE \
    "${ARGS[@]}" "$@"
"""


def test_a_script_is_read_and_not_run(tmp_path: Path) -> None:
    assert read_overrides(SCRIPT) == {
        "a.path": "$HOME/models/x",
        "a.files": ["$ROOT/train.parquet"],
        "a.added": 10240,
        "a.delta": 0.15,
        "a.batch": 256,
        "a.lr": 1e-6,
        "a.none": None,
        "a.list": [1, 2],
        "a.more": 256,
        "a.most": 2,
    }


def test_the_command_prints_a_file_that_loads(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import-config", "nemo_rl", str(configs / "grpo_math_1B.yaml")]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(printed)
    assert load_as(Recipe, tmp_path / "mine.yaml").rollout.prompts_per_step == 32
    assert "# Differs in meaning:" in printed
    assert "# Has no counterpart:" in printed
    assert max(map(len, printed.splitlines())) < 200


@pytest.mark.parametrize(
    ("framework", "text", "message"),
    [
        ("nemo_rl", None, "cannot be read"),
        ("nemo_rl", "sft: {}", "has no section `grpo`"),
        ("nemo_rl", "a: [", "not valid YAML"),
        ("nemo_rl", "- 1", "a mapping is expected"),
        ("nemo_rl", "defaults: mine.yaml", "leads back to this file"),
        ("verl", None, "cannot be read"),
        ("verl", "trainer.nnodes=2", "nothing in it sets actor_rollout_ref"),
    ],
)
def test_what_is_no_recipe_is_one_line(
    framework: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    assert main(["import-config", framework, str(tmp_path / "mine.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
