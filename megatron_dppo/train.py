"""Train a policy with DPPO.

One process per GPU (or CPU core), started by torchrun:

    torchrun --nproc-per-node 2 -m megatron_dppo train --config examples/conf/quickstart.yaml
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m megatron_dppo train \\
        --config examples/conf/qwen3_30b_a3b.yaml run.name=my-run rollout.prompts_per_step=256

Any key of the configuration can be overridden by key.sub=value. --check reads and checks everything a run reads
(configuration, model folder, tokenizer, tasks) without starting it; --check --connect also starts or finds the run's servers
and asks them all that would go wrong later: run it once on every host of the trainer's.

Exit code 2: the input cannot work, one message says why;
3: the run was stopped by what the message names (if no more rollouts could be had, what was trained is in a checkpoint);
4: another rank has failed, and says why;
75: it was asked to stop (SIGTERM, SIGUSR1, Ctrl-C, run.max_seconds), is saved, and goes on when it is started again.
"""

from __future__ import annotations

import argparse
import warnings


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-dppo train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file; see examples/conf")
    parser.add_argument("--check", action="store_true", help="check the configuration and its inputs, then stop")
    parser.add_argument("--connect", action="store_true", help="with --check: check the run's servers, too")
    parser.add_argument(
        "--world-size", type=int, help="how many processes the run will have, where torchrun does not say so"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides")
    options = parser.parse_intermixed_args(arguments)
    if options.connect and not options.check:
        parser.error("--connect goes with --check")
    return options


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse_arguments(arguments)
    # Megatron-core warns about every optional package in every module; a run reports once, by name, what it found.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    from megatron_dppo.training.command import check, train  # after the filter; and help needs no torch

    if options.check:
        return check(options.config, options.overrides, options.world_size, connect=options.connect)
    return train(options.config, options.overrides, options.world_size) or 0
