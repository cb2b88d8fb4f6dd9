"""Read a recipe of another framework and print ours, with what has no counterpart and what differs in meaning.

    megatron-dppo import-config nemo_rl examples/configs/grpo_math_1B_megatron.yaml > mine.yaml
    megatron-dppo import-config verl run_qwen3_30b_a3b_megatron.sh > mine.yaml

nemo_rl: a YAML file of a checkout of NeMo-RL; the files that it builds on have to be there, too.
verl: key=value overrides, one a line, or the shell script that passes them (it is read, never run; what stands in an if or a
loop is left out).

What is printed is a configuration file. The comments above it say, for each key of theirs, what differs (the anchor of the
ratio, clip ratios, normalisation, ...), what this trainer has no option for, and which keys are not known. Keys that are
about how the other framework works and change nothing of what is learned are left out silently. Exit code 2: the file cannot
be read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_dppo.errors import EXIT_BAD_INPUT, ConfigError

FRAMEWORKS = ("nemo_rl", "verl")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-dppo import-config", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("framework", choices=FRAMEWORKS, help="whose recipe it is")
    parser.add_argument("file", type=Path, help="the recipe")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse_arguments(arguments)
    from megatron_dppo.launch.import_config import nemo_rl, verl

    translate = {"nemo_rl": nemo_rl.translate, "verl": verl.translate}[options.framework]
    try:
        translation = translate(options.file)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(translation.as_yaml(f"{options.framework}, {options.file}"), end="")
    return 0
