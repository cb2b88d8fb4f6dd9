#!/usr/bin/env python3
"""How long replicas wait for each other in the update phase, before a run: for a configuration and a distribution of lengths.

    python -W ignore tools/plan_batches.py examples/conf/qwen3_30b_a3b.yaml --world-size 64
    python -W ignore tools/plan_batches.py examples/conf/qwen3_30b_a3b.yaml --world-size 512 --median 6000
    python -W ignore tools/plan_batches.py RECIPE --world-size 64 --run runs/NAME   # lengths of a run's samples.jsonl

Response lengths are log-normal, with a part that a prompt's responses share, cut at rollout.max_response_tokens. Every
optimizer step's schedule is made as a run makes it. Efficiency is the mean work of a replica over what the slowest takes: in
every micro-batch where experts are spread over replicas, which then meet in every layer, else in the whole step. Beside it
stands what replicas get that learn from what they sampled themselves.

Work is counted in operations of forward and backward (models/flops.py); model.path has to be there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.plan.lengths import Lengths
from megatron_dppo.models.flops import PolicyFlops
from megatron_dppo.models.hf.config import check_policy_fits, load_hf_config
from megatron_dppo.training.config.load import load_config
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.data.schedule import PADDING, PADDING_LENGTH, PlannedMicroBatch, Schedule, Scheduler


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file; see examples/conf")
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the trainer")
    parser.add_argument("--median", type=float, help="response tokens; default: a quarter of the longest")
    parser.add_argument("--sigma", type=float, default=0.6, help="of the logarithm, among responses to a prompt")
    parser.add_argument("--prompt-sigma", type=float, default=0.4, help="of the logarithm, among prompts")
    parser.add_argument("--prompt-tokens", type=int, default=150, help="of every prompt")
    parser.add_argument("--run", type=Path, help="take lengths from this run's samples.jsonl instead")
    parser.add_argument("--steps", type=int, default=4, help="rollout batches to average over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides")
    options = parser.parse_intermixed_args()
    try:
        config = load_config(options.config, options.overrides)
        hf_config = load_hf_config(config.model.path)
        check_policy_fits(hf_config, config.parallel, options.world_size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    flops = PolicyFlops.of(hf_config)
    replicas = options.world_size // config.parallel.replica_size
    coupled = config.parallel.expert_model_parallel_size > 1
    scheduler = Scheduler(config.train, config.parallel, replicas, flops.training)
    generator = torch.Generator().manual_seed(options.seed)
    table = Table(
        "optimizer step", "sequences", "tokens", "micro-batches", "efficiency", "without exchange", "s to plan"
    )
    global_ones, local_ones = [], []
    for _ in range(options.steps):
        lengths = draw_lengths(config, options, generator)
        start = time.perf_counter()
        schedules = scheduler.schedules(lengths, config.train.updates_per_rollout)
        seconds = (time.perf_counter() - start) / len(schedules)
        for index, schedule in enumerate(schedules):
            held = {number: lengths[number] for number in schedule.owners()}
            local = each_its_own(config, replicas, scheduler, held)
            global_ones.append(scheduler.efficiency(schedule, held, coupled))
            local_ones.append(scheduler.efficiency(local, held, coupled))
            table.add_row(
                str(index),
                str(len(held)),
                str(sum(held.values())),
                f"{len(schedule.replicas[0])} ({len(local.replicas[0])})",
                f"{global_ones[-1]:.3f}",
                f"{local_ones[-1]:.3f}",
                f"{seconds:.2f}",
            )
    console = Console(highlight=False)
    console.print(
        f"{options.world_size} ranks = {replicas} replicas of {config.parallel.replica_size};"
        f" {config.rollout.prompts_per_step} x {config.rollout.samples_per_prompt} samples in"
        f" {config.train.updates_per_rollout} optimizer steps; replicas meet"
        f" {'in every layer' if coupled else 'at the end of a step'}"
    )
    console.print(table)
    console.print(
        f"mean efficiency {statistics.fmean(global_ones):.3f}, worst {min(global_ones):.3f}; without exchange"
        f" {statistics.fmean(local_ones):.3f}, worst {min(local_ones):.3f}"
    )
    return 0


def draw_lengths(config: Config, options: argparse.Namespace, generator: torch.Generator) -> dict[int, int]:
    """Tokens of each of a rollout batch's sequences, by number."""
    assumed = Lengths(options.median or 0.0, options.sigma, options.prompt_sigma, options.prompt_tokens)
    if options.run is None:
        return assumed.draw(config.rollout, generator)
    seen = torch.tensor(lengths_of_run(options.run))
    count = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    return assumed.with_prompts(seen[torch.randint(len(seen), (count,), generator=generator)], config.rollout)


def lengths_of_run(run: Path) -> list[int]:
    """Response lengths of the samples that a run has logged, but for those that it chose by their reward.

    Raises ConfigError if there are none.
    """
    file = run / "samples.jsonl"
    if not file.is_file():
        raise ConfigError(f"--run: there is no {file}")
    samples = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
    return [sample["tokens"] for sample in samples if sample.get("chosen", "spread") == "spread"]


def each_its_own(config: Config, replicas: int, scheduler: Scheduler, lengths: dict[int, int]) -> Schedule:
    """The schedule of replicas that learn from what they sampled, every ``replicas``-th prompt, and run equally many
    micro-batches.
    """
    samples = config.rollout.samples_per_prompt
    alone = Scheduler(config.train, config.parallel, 1, scheduler.cost_of)
    own = [{n: length for n, length in lengths.items() if n // samples % replicas == r} for r in range(replicas)]
    made = [alone.schedule(mine).replicas[0] if mine else () for mine in own]
    count = max(map(len, made))
    idle = PlannedMicroBatch((PADDING,), PADDING_LENGTH)
    return Schedule(tuple(of_one + (idle,) * (count - len(of_one)) for of_one in made))


if __name__ == "__main__":
    sys.exit(main())
