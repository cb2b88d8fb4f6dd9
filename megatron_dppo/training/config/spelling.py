"""Values as they were written: YAML reads ``20250102_153000`` as a number, and a run's name is none.

What the configuration's types call text stays as it stands in the file or on the command line. What they call a number is
refused where YAML 1.1 means another one than is written (``010`` is 8, ``1:30`` is 90).
"""

from __future__ import annotations

import dataclasses
import re
import typing
from types import UnionType
from typing import Any

import yaml

from megatron_dppo.errors import ConfigError

_READ_OTHERWISE = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")  # octal, base 60
_QUOTED = re.compile(r"""\s*(".*"|'.*')\s*""", re.DOTALL)


def without_none(hint: Any) -> Any:
    """``str`` for ``str | None``: the type of an option that is set."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def option_types(section: Any) -> dict[str, Any]:
    """The types of a section's options, by name."""
    return typing.get_type_hints(section)


def as_written(value: Any, written: Any, hint: Any, name: str) -> Any:
    """``value``, as OmegaConf read it, with every text option as it is spelt.

    Args:
        value: plain Python values.
        written: the same with all scalars as text (``yaml.BaseLoader``).
        hint: type of the option.
        name: of the option, for the error.

    Raises:
        ConfigError: a text that YAML reads as something else and whose spelling is not known; a number that is not the one
            written.
    """
    kind = without_none(hint)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        types, spelt = option_types(kind), written if isinstance(written, dict) else {}
        return {
            key: as_written(item, spelt.get(str(key)), types.get(str(key), Any), f"{name}.{key}" if name else str(key))
            for key, item in value.items()
        }
    if typing.get_origin(kind) is list and isinstance(value, list):
        spelt_items = written if isinstance(written, list) else [None] * len(value)
        (item_type,) = typing.get_args(kind)
        return [
            as_written(item, spelt, item_type, f"{name}[{index}]")
            for index, (item, spelt) in enumerate(zip(value, spelt_items, strict=True))
        ]
    if kind is str and isinstance(value, (bool, int, float)):
        if not isinstance(written, str):
            raise ConfigError(f"`{name}` is a text, and YAML reads it as {value!r}: put it in quotes")
        return written
    if kind in (int, float) and isinstance(written, str) and _READ_OTHERWISE.fullmatch(written.strip()):
        raise ConfigError(
            f"`{name}`: YAML reads {written.strip()} as {value}: write the number without leading 0 or ':'"
        )
    return value


def text_as_typed(text: str, hint: Any) -> str | None:
    """A text option from the command line: verbatim, but for quotes around the whole; null unsets it."""
    if _QUOTED.fullmatch(text):
        return str(yaml.safe_load(text))
    optional = without_none(hint) is not hint
    if optional and text.strip() in ("", "null", "~"):
        return None
    return text
