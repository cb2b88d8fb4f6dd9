"""JSON objects, one per line, without what JSON readers let pass in silence."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.valid_text import check_text

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_object(line: bytes, place: str, exact: bool = False) -> dict[str, Any]:
    """The JSON object of a line in UTF-8; a byte-order mark before it is skipped.

    Args:
        line: as read from the file.
        place: file and line, for messages.
        exact: numbers with a point or an exponent become Decimals of the value written, not floats near it.

    Raises:
        TaskError: not UTF-8, not JSON (NaN and Infinity are not, either), no object, a key that is there twice, a float
            that is out of range, or text that cannot be encoded.
    """
    if line.startswith(_UTF16_MARKS) or b"\0" in line:
        raise TaskError(f"{place}: this is UTF-16 or no text at all; save the file as UTF-8")
    try:
        row = json.loads(
            line.decode("utf-8-sig"),
            object_pairs_hook=_distinct,
            parse_float=Decimal if exact else _in_range,
            parse_constant=_no_constant,
        )
        if not isinstance(row, dict):
            raise TaskError(f"{place}: expected a JSON object, found {type(row).__name__}")
        for key, value in row.items():
            check_text(key, f"{place}: a key")
            check_text(value, f"{place}: {key}")
    except TaskError:
        raise
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{place}: not valid JSON: {error}") from error
    return row


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return row


def _in_range(spelling: str) -> float:
    """The float; an error where it would be infinite, or 0 although the number is not."""
    value = float(spelling)
    mantissa = spelling.lower().partition("e")[0]
    if math.isinf(value) or (value == 0.0 and mantissa.strip("-0.")):
        raise ValueError(f"the number {spelling} is out of range")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
