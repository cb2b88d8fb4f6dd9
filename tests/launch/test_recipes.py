"""Recipes: found by name or path, with a typed section for the launcher."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.recipes import load_recipe


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
    with pytest.raises(ConfigError, match="recipe none-such: neither a file nor the name of a recipe; "):
        load_recipe("none-such")
