"""The command ``megatron-dppo plan``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dppo.errors import EXIT_BAD_INPUT, ConfigError

if TYPE_CHECKING:
    from megatron_dppo.launch.config import Recipe

_DOES_NOT_FIT = 1
_TEXT = """\
What a recipe takes, before it is given GPUs: the memory of every kind of rank, the servers' room for their KV cache, the
seconds of a step. Needs no GPU and no weights, of the model its config.json alone.

  megatron-dppo plan --recipe qwen3_30b_a3b.yaml --gpus 16
  megatron-dppo plan --recipe R --search                         the fastest layouts of as many GPUs
  megatron-dppo plan --recipe R --gpu h200 --assume network=90e9 parallel.tensor_model_parallel_size=2

Each rank's part of the trainer is built and run without values; seconds are a roofline over what was counted, with the
assumptions that are printed (docs/plan.md says what is counted, what is assumed, and how far it was checked).

Exit code: 0 it fits; 1 it does not, and what would make it fit is printed; 2 the recipe cannot work."""


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same plan wherever it is made
    from megatron_dppo.launch.plan.hardware import GPUS

    parser = argparse.ArgumentParser(
        prog="megatron-dppo plan", description=_TEXT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", required=True, metavar="R", help="a file, or the name of one in examples/conf/recipe"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="of the trainer; default: the recipe's launch section")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="default: the recipe's, or 8")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="default: h100")
    parser.add_argument(
        "--assume", action="append", default=[], metavar="name=value", help="see docs/plan.md; may be repeated"
    )
    parser.add_argument("--search", action="store_true", help="rank other layouts of as many GPUs; takes minutes")
    parser.add_argument("--json", action="store_true", help="one object: bytes and seconds")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides")
    options = parser.parse_intermixed_args(arguments)
    try:
        return _plan(options)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def trainer_gpus(recipe: Recipe, given: int | None, gpus_per_node: int) -> int:
    """How many GPUs train. Raises ConfigError if the recipe does not say."""
    if given is not None:
        if given < 1:
            raise ConfigError(f"--gpus {given}: at least one GPU has to train")
        return given
    launch, sglang = recipe.launch, recipe.rollout.sglang
    if launch.processes_per_node is not None and launch.gpus_per_node:
        return launch.trainer_nodes * launch.processes_per_node
    if not launch.gpus_per_node:
        raise ConfigError("launch.gpus_per_node is 0: set it, or give --gpus, the number of GPUs that train")
    gpus = launch.trainer_nodes * gpus_per_node
    serves = recipe.rollout.engine == "sglang" and sglang.starts_servers_here and not sglang.colocated
    if serves and not launch.server_nodes:
        gpus -= sglang.num_servers * sglang.tensor_model_parallel_size
    if gpus < 1:
        raise ConfigError(
            f"launch.trainer_nodes = {launch.trainer_nodes} hosts of {gpus_per_node} GPUs have none left beside"
            f" rollout.sglang.num_servers = {sglang.num_servers} servers on {sglang.tensor_model_parallel_size} GPUs each:"
            " add trainer_nodes, or server_nodes"
        )
    return gpus


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_dppo.launch.plan.hardware import GPUS, assumptions_from
    from megatron_dppo.launch.plan.memory import Memo
    from megatron_dppo.launch.plan.plan import make_plan
    from megatron_dppo.launch.plan.remedies import find_remedies
    from megatron_dppo.launch.plan.search import search
    from megatron_dppo.launch.plan.tables import as_json, print_plan
    from megatron_dppo.launch.recipes import load_recipe
    from megatron_dppo.models.hf.config import load_hf_config

    recipe = load_recipe(options.recipe, options.overrides)
    if not Path(recipe.model.path, "config.json").is_file():
        raise ConfigError(
            f"model.path: there is no {Path(recipe.model.path, 'config.json')}; a plan needs this one file of the model"
        )
    memo = Memo()
    gpus_per_node = options.gpus_per_node or recipe.launch.gpus_per_node or 8
    plan = make_plan(
        recipe,
        load_hf_config(recipe.model.path),
        world_size=trainer_gpus(recipe, options.gpus, gpus_per_node),
        gpus_per_node=gpus_per_node,
        gpu=GPUS[options.gpu],
        assume=assumptions_from(options.assume),
        memo=memo,
    )
    remedies = find_remedies(plan, memo) if plan.problems else []
    found = search(plan, memo) if options.search else None
    if options.json:
        print(json.dumps(as_json(plan, remedies, found)))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 126)
        print_plan(plan, remedies, found, console)
    return _DOES_NOT_FIT if plan.problems else 0
