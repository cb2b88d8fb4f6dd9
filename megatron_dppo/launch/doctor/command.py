"""Look at this host before a run: versions, kernels, ports, disk, limits, the loss, one step of training, one weight sync.

    megatron-dppo doctor
    megatron-dppo doctor --recipe examples/conf/quickstart.yaml run.root=runs --quick
    megatron-dppo doctor mismatch MODEL

Prints one line for each thing, ok, note or error, and below each that needs it what to do. Run it on every host. The last two
checks, a step of training and one with a real SGLang server, take a minute or two; --quick leaves them out.

`doctor mismatch MODEL` compares what server, policy and transformers compute for the same tokens, and names the side and the
operator that differ (megatron-dppo doctor mismatch --help).

Exit code 1: a line is an error; 2: the arguments cannot work, one message says why.
"""

from __future__ import annotations

import argparse
import sys
import warnings

from megatron_dppo.errors import BAD_INPUT, EXIT_BAD_INPUT

EXIT_FOUND_ERRORS = 1


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-dppo doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", help="the run's YAML file, or the name of a recipe; default: no run in particular")
    parser.add_argument(
        "--server-python", help="interpreter that has SGLang; default: the recipe's rollout.sglang.python"
    )
    parser.add_argument("--quick", action="store_true", help="without a step of training and a sync")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides")
    options = parser.parse_intermixed_args(arguments)
    if options.overrides and not options.recipe:
        parser.error(f"{options.overrides[0]!r} overrides a recipe's option: name it, --recipe R")
    return options


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if arguments[:1] == ["mismatch"]:
        from megatron_dppo.launch.doctor.mismatch.command import main as mismatch

        return mismatch(arguments[1:])
    options = parse_arguments(arguments)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    from megatron_dppo.launch.config import Recipe  # help needs none of this
    from megatron_dppo.launch.doctor.checks import examine
    from megatron_dppo.launch.doctor.lines import Subject, table
    from megatron_dppo.launch.recipes import load_recipe

    try:
        recipe = load_recipe(options.recipe, options.overrides) if options.recipe else Recipe()
    except BAD_INPUT as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    python = options.server_python or recipe.rollout.sglang.python
    lines = list(examine(Subject(recipe, python, bool(options.recipe)), quick=options.quick))
    print(table(lines))
    failed = [line.what for line in lines if line.state == "error"]
    print(f"\n{len(failed)} of {len(lines)} lines are errors: {', '.join(failed)}" if failed else "\nno errors")
    return EXIT_FOUND_ERRORS if failed else 0
