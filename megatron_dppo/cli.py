"""The command ``megatron-dppo``, also ``python -m megatron_dppo``: one table of its sub-commands.

Each sub-command is a module with ``main(arguments: list[str]) -> int``, which returns the exit code: 0, or one of errors.py.
A module is imported when its command is chosen, so that help is there at once and no command needs another's packages.
"""

from __future__ import annotations

import difflib
import importlib
import sys

from megatron_dppo.errors import EXIT_BAD_INPUT

# {command: (its module, what it does)}
COMMANDS = {
    "train": ("megatron_dppo.train", "train a policy with DPPO: one process of a run that torchrun starts"),
    "serve": ("megatron_dppo.serve", "serve a run's policy on this host, for trainers on others"),
    "report": ("megatron_dppo.launch.report.command", "one HTML page about runs: curves, samples by token, times"),
    "data": ("megatron_dppo.data", "read all data of a run and say what is wrong with it"),
    "doctor": (
        "megatron_dppo.launch.doctor.command",
        "look at this host before a run; find where server and policy disagree",
    ),
    "plan": ("megatron_dppo.launch.plan.command", "memory and time of a recipe, before it is given GPUs"),
    "launch": ("megatron_dppo.launch.command", "start a whole run: on this machine, on Slurm, or as a manifest"),
    "convert": ("megatron_dppo.convert", "training checkpoint <-> Hugging Face folder"),
    "import-config": ("megatron_dppo.launch.import_config.command", "a recipe of NeMo-RL or verl as one of ours"),
}


def usage() -> str:
    """The text of ``--help``."""
    commands = [f"  {name:<15} {meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megatron-dppo COMMAND ...",
            "",
            "Reinforcement learning of Megatron-core policies with DPPO (arXiv 2602.04879).",
            "",
            *commands,
            "",
            "megatron-dppo COMMAND --help says what a command takes. Configurations: examples/conf, docs/configuration.md.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the sub-command that ``arguments`` (the process's own, if None) name; returns its exit code."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(usage())
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: {command!r} is no command of megatron-dppo; {advice}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return importlib.import_module(COMMANDS[command][0]).main(rest)
