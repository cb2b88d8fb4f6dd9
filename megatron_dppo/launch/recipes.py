"""Recipes by name: the files of ``examples/conf/recipe`` in this checkout, and any other configuration by its path."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.config import Recipe
from megatron_dppo.training.config.load import load_as

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "conf" / "recipe"


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A run's configuration with its section ``launch``. Raises ConfigError."""
    return load_as(Recipe, find_recipe(name_or_path), overrides)


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe. Raises ConfigError, naming the recipes there are, if there is none."""
    path, named = Path(name_or_path), RECIPES / f"{name_or_path}.yaml"
    if path.is_file():
        return path
    if named.is_file():
        return named
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    near = difflib.get_close_matches(str(name_or_path), known, n=1)
    some = (
        f"there are {', '.join(known)}" if known else f"names are of a checkout, and there is no {RECIPES}: give a path"
    )
    advice = f"did you mean {near[0]}?" if near else some
    raise ConfigError(f"recipe {name_or_path}: neither a file nor the name of a recipe; {advice}")
