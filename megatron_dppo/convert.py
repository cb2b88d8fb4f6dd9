"""Training checkpoint <-> Hugging Face folder, on one CPU process; no GPU and none of the run's layout is needed.

    megatron-dppo convert to-hf runs/math/checkpoints/step_00000200 exported --tokenizer models/Qwen3-4B --verify
    megatron-dppo convert from-hf exported runs/next/checkpoints --verify

``to-hf`` reads a checkpoint that any layout wrote. ``from-hf`` writes ``step_00000000``, without optimizer state, into the
checkpoints folder of a run to be: training with that run.root and run.name starts from it, in any layout. ``--verify``
computes the logits of a few tokens with transformers from the Hugging Face folder, and with Megatron from the checkpoint,
both in fp32, and fails if they differ by more than rounding.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_dppo.errors import EXIT_BAD_INPUT, CheckpointError


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-dppo convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("to-hf", help="training checkpoint -> Hugging Face folder")
    export.add_argument("checkpoint", type=Path, help="a folder step_<N>")
    export.add_argument("folder", type=Path, help="written; must not exist")
    export.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are copied (default: none)")
    start = commands.add_parser("from-hf", help="Hugging Face folder -> checkpoint that a run can start from")
    start.add_argument("folder", type=Path, help="with config.json and safetensors")
    start.add_argument("checkpoints", type=Path, help="<run.root>/<run.name>/checkpoints of the run to be")
    start.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="the run's model.dtype (default: bf16)"
    )
    for command in (export, start):
        command.add_argument("--verify", action="store_true", help="compare the logits of both models")
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> None:
    """Do what was asked for."""
    # Before torch looks: Megatron-core takes a visible GPU wherever there is one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    from megatron_dppo.training.checkpoint.conversion import from_hf, to_hf

    logging.disable_progress_bar()
    if options.command == "to-hf":
        to_hf(options.checkpoint, options.folder, tokenizer=options.tokenizer, verify=options.verify)
    else:
        from_hf(options.folder, options.checkpoints, dtype=options.dtype, verify=options.verify)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse_arguments(arguments)
    try:
        convert(options)
    except (ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0
