"""What a recipe of another framework becomes here, key by key: an option, a remark, or nothing with a reason.

Every key of the source ends up in one place. One that no rule reads is reported as unknown, unless it is switched off.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from megatron_dppo.launch.config import Recipe

_OFF: tuple[Any, ...] = (None, False, 0, "", [], {}, "null", "None")
_WIDTH = 124


@dataclass
class Source:
    """Options of another framework, flat, and which of them have been read."""

    values: Mapping[str, Any]
    read: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which then counts as read; ``default`` if it is absent or null."""
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def is_on(self, key: str) -> bool:
        """Whether a switch is on, or an amount is not 0."""
        return self.take(key) not in _OFF

    def unread(self) -> list[str]:
        """Keys that nothing has read and that are not switched off."""
        return [key for key, value in self.values.items() if key not in self.read and value not in _OFF]


def granularity(recomputes: object) -> str:
    """A switch for activation recompute -> ours."""
    return "full" if recomputes else "none"


@dataclass
class Translation:
    """The recipe that comes of it.

    Attributes:
        source: what it comes from.
        options: {dotted key: value}.
        differs: {their key: how its meaning differs from that of the option it became}.
        missing: {their key: why there is no option for it}.
        unknown: their keys that no rule knows.
    """

    source: Source
    options: dict[str, Any] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def copy(self, names: Mapping[str, str], convert: Callable[[Any], Any] = lambda value: value) -> None:
        """Options that mean the same: {their key: ours}. Of several for one option the first that is set counts."""
        for theirs, ours in names.items():
            value = self.source.take(theirs)
            if value is not None and ours not in self.options:
                self.options[ours] = convert(value)

    def drop(self, reasons: Mapping[str, str]) -> None:
        """{their key or section: why it has no counterpart}; said only of what is switched on."""
        for theirs, reason in reasons.items():
            within = [key for key in self.source.values if key == theirs or key.startswith(f"{theirs}.")]
            switched_on = [key for key in within if self.source.is_on(key)]  # all of them count as read
            if switched_on:
                self.missing[theirs] = reason

    def ignore(self, prefixes: Iterable[str]) -> None:
        """Keys about how the other framework works, not about what is learned."""
        for key in self.source.values:
            if any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes):
                self.source.read.add(key)

    def finish(self) -> None:
        """Collect what no rule has read."""
        self.unknown = self.source.unread()

    def as_yaml(self, origin: str) -> str:
        """A configuration file with everything that was noticed as comments above it."""
        parts = [f"# From {origin}.", "# Look at every line, then: megatron-dppo train --check --config THIS_FILE"]
        for title, entries in (
            ("Differs in meaning", self.differs),
            ("Has no counterpart", self.missing),
            ("Not known to this importer", dict.fromkeys(self.unknown, "")),
        ):
            if entries:
                parts += ["#", f"# {title}:"]
                parts += [line for key, text in entries.items() for line in self._remark(key, text)]
        return "\n".join([*parts, yaml.safe_dump(_nested(self.options), sort_keys=False, width=_WIDTH)])

    def _remark(self, key: str, text: str) -> list[str]:
        value = self.source.values.get(key)
        head = f"{key} = {value}" if key in self.source.values else key
        return textwrap.wrap(
            f"{head}: {text}" if text else head,
            width=_WIDTH,
            initial_indent="#   ",
            subsequent_indent="#     ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """A tree, its sections in the order of the configuration."""
    tree: dict[str, Any] = {section.name: {} for section in fields(Recipe)}
    for key, value in options.items():
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return {name: section for name, section in tree.items() if section}
