#!/usr/bin/env python3
"""Train a policy with DPPO.

One process per GPU (or CPU core), started by torchrun:

    torchrun --nproc-per-node 2 examples/pretrain_dppo.py --config examples/conf/quickstart.yaml
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/pretrain_dppo.py --config examples/conf/qwen3_30b_a3b.yaml run.name=my-run rollout.prompts_per_step=256

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
import sys
import warnings
from datetime import datetime
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

# Megatron-core warns about every optional package in every module; a run reports once, by name, what it found.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")

from megatron_dppo.distributed.ranks import choose_device, world_size
from megatron_dppo.distributed.said_once import is_first_to_say
from megatron_dppo.errors import ASKED_TO_STOP, BAD_INPUT, STOPPED, CheckpointError
from megatron_dppo.training.config.load import load_config
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.inputs import RunInputs, read_run_inputs
from megatron_dppo.training.run import check_run_folder, run_training

EXIT_BAD_INPUT = 2
EXIT_START_AGAIN = 75  # EX_TEMPFAIL: asked to stop, and saved
EXIT_STOPPED = 3  # the rollout engine gave out, a checkpoint cannot be read or written, a gradient is NaN, ...


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; see examples/conf")
    parser.add_argument("--check", action="store_true", help="check the configuration and its inputs, then stop")
    parser.add_argument("--connect", action="store_true", help="with --check: check the run's servers, too")
    parser.add_argument("--world-size", type=int, help="with --check: how many processes the run will have")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides")
    arguments = parser.parse_intermixed_args()
    if arguments.connect and not arguments.check:
        parser.error("--connect goes with --check")
    return arguments


def read_input(arguments: argparse.Namespace) -> tuple[Config, RunInputs]:
    """Everything that can be wrong with the input is found here, before any process group or model exists."""
    config = load_config(arguments.config, arguments.overrides)
    if config.run.name is None:
        config.run.name = f"{Path(arguments.config).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    inputs = read_run_inputs(config, arguments.world_size or world_size())
    check_run_folder(config, inputs.hf_config)
    return config, inputs


def connect(config: Config) -> int:
    """Report on the run's servers."""
    from megatron_dppo.training.server_check import check_servers  # its HTTP client is an extra

    try:
        reports = check_servers(config)
    except BAD_INPUT as error:
        return fail(error, EXIT_BAD_INPUT)
    except STOPPED as error:
        return fail(error, EXIT_STOPPED)
    print(*reports, sep="\n")
    return EXIT_BAD_INPUT if any(report.is_fatal for report in reports) else 0


def fail(error: Exception, exit_code: int) -> int:
    """Say why, once for all ranks, whichever of them is first to know."""
    message = str(error)
    if is_first_to_say(message):
        print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_code


@record  # torchrun's agents then show the traceback of the rank that failed first
def main() -> int:
    arguments = parse_arguments()
    try:
        config, inputs = read_input(arguments)
        device = choose_device(config.run.device)
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    except CheckpointError as error:
        return fail(error, EXIT_STOPPED)
    if arguments.check:
        print(f"{arguments.config}: fine ({inputs.hf_config.model_type}, {len(inputs.eval_prompts)} held-out prompts)")
        return connect(config) if arguments.connect else 0
    try:
        run_training(config, inputs, device)
    except BAD_INPUT as error:
        return fail(error, EXIT_BAD_INPUT)
    except ASKED_TO_STOP as request:
        if is_first_to_say(str(request)):
            print(request, flush=True)
        return EXIT_START_AGAIN
    except STOPPED as error:
        return fail(error, EXIT_STOPPED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
