"""Recipes: found by name or path, with a typed section for the launcher, and fit for their model and their GPUs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.config import Recipe
from megatron_dppo.launch.recipes import RECIPES, load_recipe
from megatron_dppo.models.hf.config import check_policy_fits, load_hf_config
from megatron_dppo.training.config.check import check_config
from tests.models import published_configs

# {recipe: (its model, trainer ranks, GPUs of servers on nodes of their own or beside the trainer's)}
WORLDS = {
    "dppo-qwen3-30b-a3b-base-4n8g-tp2ep8": ("QWEN3_30B_A3B_BASE", 16, 16),
    "dppo-qwen3-8b-1n8g-tp2-split": ("QWEN3_8B", 4, 4),
    "dppo-qwen3-8b-1n8g-tp2-colocated": ("QWEN3_8B", 8, 8),
    "dppo-qwen3-30b-a3b-8n8g-tp4ep8": ("QWEN3_30B_A3B", 32, 32),
    "dppo-qwen3-235b-a22b-64n8g-tp4pp4ep8": ("QWEN3_235B_A22B", 256, 256),
    "dppo-qwen3-4b-thinking-8n8g-tp2cp4-65k": ("QWEN3_4B_THINKING_2507", 16, 48),
    "dppo-r1-distill-qwen-1.5b-1n8g-dp8-sanity": ("R1_DISTILL_QWEN_1_5B", 8, 8),
}


def gpus(recipe: Recipe) -> int:
    launch = recipe.launch
    return (launch.trainer_nodes + launch.server_nodes) * launch.gpus_per_node


def test_every_recipe_is_tested_and_has_a_twin() -> None:
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert names == {*WORLDS, *(f"{name}-tiny" for name in WORLDS)}


@pytest.mark.parametrize("name", WORLDS)
def test_a_recipe_fits_its_model_and_uses_all_its_gpus(name: str) -> None:
    model, ranks, served = WORLDS[name]
    recipe = load_recipe(name, ["rollout.sglang.python=null"])
    check_config(recipe, load_hf_config(getattr(published_configs, model)), ranks)
    sglang = recipe.rollout.sglang
    assert sglang.num_servers * sglang.tensor_model_parallel_size == served
    assert (ranks if sglang.colocated else ranks + served) == gpus(recipe)
    nodes = recipe.launch.trainer_nodes + recipe.launch.server_nodes
    assert f"-{nodes}n{recipe.launch.gpus_per_node}g-" in name


def test_a_layout_that_does_not_fit_a_recipe_is_refused() -> None:
    recipe = load_recipe("dppo-qwen3-235b-a22b-64n8g-tp4pp4ep8", ["parallel.num_layers_in_first_pipeline_stage=24"])
    with pytest.raises(ConfigError, match="num_hidden_layers=94 cannot be divided"):
        check_policy_fits(load_hf_config(published_configs.QWEN3_235B_A22B), recipe.parallel, 256)


@pytest.mark.parametrize("name", WORLDS)
def test_a_twin_has_the_features_of_its_recipe(name: str) -> None:
    recipe, twin = load_recipe(name), load_recipe(f"{name}-tiny")
    assert twin.algorithm.loss.divergence == recipe.algorithm.loss.divergence
    assert twin.algorithm.loss.thresholds == recipe.algorithm.loss.thresholds
    assert twin.algorithm.loss.aggregation == recipe.algorithm.loss.aggregation
    assert twin.algorithm.advantage == recipe.algorithm.advantage
    for feature in ("batching", "fused_linear"):
        assert getattr(twin.train, feature) == getattr(recipe.train, feature)
    for how in ("granularity", "method", "modules"):  # its layers are fewer
        assert getattr(twin.model.recompute, how) == getattr(recipe.model.recompute, how)
    for overlap in ("overlap_grad_reduce", "overlap_param_gather"):
        assert getattr(twin.parallel, overlap) == getattr(recipe.parallel, overlap)
    for size in ("tensor", "pipeline", "context", "expert"):
        sizes = [
            getattr(r.parallel, f"{size}_model_parallel_size", None) or r.parallel.context_parallel_size
            for r in (recipe, twin)
        ]
        assert (sizes[0] > 1) == (sizes[1] > 1), size


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_where_its_numbers_are_from(path: Path) -> None:
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    tags = set(re.findall(r"# \[(\w+)\]", "\n".join(lines)))
    head = "\n".join([first, *lines]).partition("defaults:")[0]
    assert all(f"[{tag}] is" in head for tag in tags)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("launch: {trainer_node: 2}", "unknown key `launch.trainer_node`; did you mean `launch.trainer_nodes`"),
        ("launch: {trainer_nodes: 0}", "launch.trainer_nodes must be at least 1, not 0"),
        ("launch: {gpus_per_node: eight}", "launch.gpus_per_node: .*eight"),
    ],
)
def test_the_launch_section_is_typed(tmp_path: Path, section: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(section)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_the_launch_section_is_read_with_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("launch: {trainer_nodes: 2}\ntrain: {steps: 3}")
    recipe = load_recipe(path, ["launch.server_nodes=1"])
    assert (recipe.launch.trainer_nodes, recipe.launch.server_nodes, recipe.train.steps) == (2, 1, 3)


def test_an_unknown_recipe_is_one_error() -> None:
    with pytest.raises(ConfigError, match="did you mean dppo-qwen3-8b-1n8g"):
        load_recipe("dppo-qwen3-8b")


def test_the_page_has_every_recipe_with_its_gpus() -> None:
    page = (RECIPES.parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(dppo-[^`]+)` \| ([^|]+) \|", page, re.MULTILINE))
    colocated = {name for name in WORLDS if load_recipe(name).rollout.sglang.colocated}
    assert rows == {
        name: f"{ranks}, by turns" if name in colocated else f"{ranks} + {served}"
        for name, (_, ranks, served) in WORLDS.items()
    }
