"""Jobs of small recipes for the tests of launching."""

from __future__ import annotations

from pathlib import Path

from megatron_dppo.launch.config import Recipe
from megatron_dppo.launch.job import Job, describe
from megatron_dppo.launch.recipes import load_recipe

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "conf" / "quickstart.yaml"
ON_GPUS = ROOT / "examples" / "conf" / "qwen3_30b_a3b.yaml"
# The same on every machine; what of it a shell could misread is the subject of tests of its own.
ELSEWHERE = ("launch.directory=/shared/me", "launch.python=/shared/venv/bin/python", "run.name=first", "run.root=runs")


def quickstart(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, [*ELSEWHERE, "launch.processes_per_node=null", *overrides])


def on_gpus(*overrides: str) -> Recipe:
    """Two trainer nodes and one of servers, eight GPUs each, unless told otherwise."""
    size = ("launch.trainer_nodes=2", "launch.server_nodes=1", "launch.gpus_per_node=8")
    return load_recipe(ON_GPUS, [*ELSEWHERE, *size, *overrides])


def job_on_gpus(*overrides: str) -> Job:
    return describe(on_gpus(*overrides))
