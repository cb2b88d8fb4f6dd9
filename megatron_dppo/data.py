"""Look at the data of a run before it starts.

    megatron-dppo data check --recipe examples/conf/quickstart.yaml
    megatron-dppo data check --recipe my-run.yaml --samples 5 tasks.train[0].path=other.parquet

Reads every row of every task of the configuration and names all that cannot be used, by file and row; counts questions that
repeat and questions that are evaluated on; and shows the first prompts as the model reads them. With the tokenizer of the
configuration at hand, prompts are counted in tokens too.

Exit code 1: something is bad; 2: the configuration itself cannot work, one message says why.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dppo.errors import BAD_INPUT, EXIT_BAD_INPUT

if TYPE_CHECKING:
    from megatron_dppo.tasks.prompting import PromptEncoder
    from megatron_dppo.training.config.schema import Config


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-dppo data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["check"])
    parser.add_argument("--recipe", required=True, help="YAML file, or the name of a recipe in examples/conf/recipe")
    parser.add_argument("--samples", type=int, default=1, help="prompts shown per task (default 1)")
    parser.add_argument("--lines", type=int, default=50, help="bad rows that are named; all are counted (default 50)")
    parser.add_argument("--no-tokenizer", action="store_true", help="count no tokens, which takes most of the time")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse_arguments(arguments)
    # Megatron-core, which a tokenizer's checks import, warns about every optional package.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    from megatron_dppo.launch.recipes import load_recipe  # help needs none of this
    from megatron_dppo.tasks.data_check import DataCheck

    try:
        config = load_recipe(options.recipe, options.overrides)
        encoder = None if options.no_tokenizer else _encoder_at_hand(config)
        if encoder is None and not options.no_tokenizer:
            print("no tokenizer is at hand (model.path, model.tokenizer): tokens are not counted")
        check = DataCheck(encoder, config.rollout.max_prompt_tokens, options.samples, options.lines, print)
        return 0 if check.check(config.tasks.train, config.tasks.eval) else 1
    except BAD_INPUT as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _encoder_at_hand(config: Config) -> PromptEncoder | None:
    """Of the run's tokenizer, if its folder is there. Raises ConfigError if nothing loads from it, or TaskError."""
    folder = Path(config.model.tokenizer or config.model.path)
    if not config.model.path or not folder.is_dir():
        return None
    from megatron_dppo.tasks.prompting import PromptEncoder
    from megatron_dppo.training.inputs import read_tokenizer  # transformers take seconds

    tasks = [*config.tasks.train, *config.tasks.eval]
    return PromptEncoder(read_tokenizer(folder), tasks, config.rollout.max_prompt_tokens, chat=config.model.chat)
