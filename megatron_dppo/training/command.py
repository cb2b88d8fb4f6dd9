"""A run as one process of it sees the command line: input read, trained or checked, and every end told as an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from megatron_dppo.distributed.ranks import choose_device, world_size
from megatron_dppo.distributed.said_once import is_first_to_say
from megatron_dppo.errors import (
    ASKED_TO_STOP,
    BAD_INPUT,
    EXIT_BAD_INPUT,
    EXIT_START_AGAIN,
    EXIT_STOPPED,
    STOPPED,
    CheckpointError,
)
from megatron_dppo.training.config.load import load_config
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.inputs import RunInputs, read_run_inputs
from megatron_dppo.training.run import check_run_folder, run_training


def read_input(path: str, overrides: Sequence[str], ranks: int | None) -> tuple[Config, RunInputs]:
    """Everything that can be wrong with the input is found here, before any process group or model exists.

    Args:
        path: of the configuration.
        overrides: of it.
        ranks: of the run; None: as many as torchrun has started.
    """
    config = load_config(path, overrides)
    if config.run.name is None:
        config.run.name = f"{Path(path).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    inputs = read_run_inputs(config, ranks or world_size())
    check_run_folder(config, inputs.hf_config)
    return config, inputs


def check(path: str, overrides: Sequence[str], ranks: int | None, *, connect: bool) -> int:
    """Check the input, and with ``connect`` the servers, of a run of so many ranks."""
    try:
        config, inputs = read_input(path, overrides, ranks)
        choose_device(config.run.device)
    except (ValueError, OSError, CheckpointError) as error:
        return _refuse(error)
    print(f"{path}: fine ({inputs.hf_config.model_type}, {len(inputs.eval_prompts)} held-out prompts)")
    return _check_servers(config) if connect else 0


@record  # torchrun's agents then show the traceback of the rank that failed first
def train(path: str, overrides: Sequence[str], ranks: int | None) -> int:
    """Be one rank of a run; returns the exit code."""
    try:
        config, inputs = read_input(path, overrides, ranks)
        device = choose_device(config.run.device)
    except (ValueError, OSError, CheckpointError) as error:
        return _refuse(error)
    try:
        run_training(config, inputs, device)
    except BAD_INPUT as error:
        return _fail(error, EXIT_BAD_INPUT)
    except ASKED_TO_STOP as request:
        if is_first_to_say(str(request)):
            print(request, flush=True)
        return EXIT_START_AGAIN
    except STOPPED as error:
        return _fail(error, EXIT_STOPPED)
    return 0


def _check_servers(config: Config) -> int:
    from megatron_dppo.training.server_check import check_servers  # its HTTP client is an extra

    try:
        reports = check_servers(config)
    except BAD_INPUT as error:
        return _fail(error, EXIT_BAD_INPUT)
    except STOPPED as error:
        return _fail(error, EXIT_STOPPED)
    print(*reports, sep="\n")
    return EXIT_BAD_INPUT if any(report.is_fatal for report in reports) else 0


def _refuse(error: Exception) -> int:
    return _fail(error, EXIT_STOPPED if isinstance(error, CheckpointError) else EXIT_BAD_INPUT)


def _fail(error: Exception, exit_code: int) -> int:
    """Say why, once for all ranks, whichever of them is first to know."""
    message = str(error)
    if is_first_to_say(message):
        print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_code
