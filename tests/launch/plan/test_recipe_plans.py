"""Every recipe fits the GPUs that it says it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dppo.cli import main
from megatron_dppo.launch.recipes import RECIPES, load_recipe
from tests.launch.plan.recipes import model_folder
from tests.models import published_configs

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.endswith("-tiny"))
LARGEST = "dppo-qwen3-235b-a22b-64n8g-tp4pp4ep8"


def _published(recipe: str) -> dict[str, Any]:
    model = Path(load_recipe(recipe).model.path).name.removeprefix("DeepSeek-")
    fields: dict[str, Any] = getattr(published_configs, model.upper().replace("-", "_").replace(".", "_"))
    return fields


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == LARGEST else (pytest.mark.nightly, pytest.mark.slow)) for name in NAMES],
)
def test_a_recipe_fits_its_gpus(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = f"model.path={model_folder(tmp_path / 'model', _published(name))}"
    assert main(["plan", "--recipe", name, model, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["fits"]
    assert made["step"]["total"] > 0
    launch = load_recipe(name).launch
    servers = 0 if load_recipe(name).rollout.sglang.colocated else made["servers"]["count"] * made["servers"]["ranks"]
    assert made["trainer_gpus"] + servers == (launch.trainer_nodes + launch.server_nodes) * launch.gpus_per_node


def test_the_largest_is_among_them():
    assert LARGEST in NAMES
