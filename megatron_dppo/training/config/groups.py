"""Files that are chosen by name: ``cluster=slurm``.

A group is a folder of files of which a configuration names one under ``defaults:``, e.g. ``cluster/local.yaml``. A choice
puts another file of that folder in its place, or a file of one's own, ``cluster=my/site.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_dppo.errors import ConfigError

GROUPS = ("cluster",)


@dataclass
class Choices:
    """What was chosen, and which choices have met a file that they replace.

    Attributes:
        names: {group: file name without .yaml, or path of a file}.
        made: groups of which a file was replaced.
    """

    names: dict[str, str] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)

    def check_all_made(self, path: str | Path) -> None:
        """Raise ConfigError if a choice replaces nothing."""
        for group in self.names.keys() - self.made:
            raise ConfigError(
                f"{path}: {group}={self.names[group]} replaces nothing: `defaults:` names no file of a folder `{group}`"
            )


def split_choices(overrides: Sequence[str]) -> tuple[Choices, list[str]]:
    """(choices of files, options to set) of a command line."""
    choices, options = Choices(), []
    for override in overrides:
        group, equals, name = override.partition("=")
        if group in GROUPS and equals:
            choices.names[group] = name
        else:
            options.append(override)
    return choices, options


def in_place_of(base: Path, choices: Choices) -> Path:
    """The file to read for ``base``, one that stands under ``defaults:``."""
    group = base.resolve().parent.name
    if group not in choices.names:
        return base
    choices.made.add(group)
    name = choices.names[group]
    return Path(name) if name.endswith((".yaml", ".yml")) else base.with_name(f"{name}.yaml")
