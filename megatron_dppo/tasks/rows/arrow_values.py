"""From Arrow's types to what JSON has; what JSON has nothing for is refused, by name.

A converter is made once per column, from its type, and takes what ``to_pylist`` gives. Texts, integers and truth values need
none. Null is the same as absent: in a struct, whose members every row has, it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from megatron_dppo.compat.extras import from_extra

with from_extra("data"):
    import pyarrow as pa

Converter = Callable[[Any], Any]


def converter(kind: pa.DataType, exact: bool = False) -> Converter | None:
    """What turns a value of an Arrow type into a JSON-like one; None where it is one already.

    The converter raises ValueError for NaN and infinity, and for bytes and durations, for which JSON has no value.

    Args:
        kind: of the column, or of the member of a struct or list.
        exact: decimals stay Decimals, as ``Row.read`` promises.
    """
    types = pa.types
    if types.is_dictionary(kind):
        return converter(kind.value_type, exact)
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_null(kind) or _is_text(kind):
        return None
    if types.is_floating(kind):
        return _finite if types.is_float64(kind) else _shortest
    if types.is_decimal(kind):
        return _unchanged if exact else _as_float
    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind):
        return lambda value: value.isoformat()
    if types.is_struct(kind):
        return _struct({field.name: converter(field.type, exact) for field in kind})
    if types.is_map(kind):
        return _map(converter(kind.item_type, exact))
    if _is_list(kind):
        inner = converter(kind.value_type, exact)
        return None if inner is None else lambda values: [None if v is None else inner(v) for v in values]
    return _refusal(f"a {kind} is nothing that JSON has")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no JSON number; write null")
    return value


def _shortest(value: float) -> float:
    """The number that a narrow float was made of: 0.1, and not 0.10000000149011612."""
    _finite(value)
    single = pa.scalar(value, pa.float32())
    for digits in range(1, 10):  # nine digits tell all floats of 32 bits apart
        shorter = float(f"{value:.{digits}g}")
        if pa.scalar(shorter, pa.float32()) == single:
            return shorter
    return value


def _unchanged(value: Decimal) -> Decimal:
    return value


def _as_float(value: Decimal) -> float:
    return float(value)


def _struct(members: dict[str, Converter | None]) -> Converter:
    def convert(value: dict[str, Any]) -> dict[str, Any]:
        return {
            name: item if (inner := members[name]) is None else inner(item)
            for name, item in value.items()
            if item is not None
        }

    return convert


def _map(inner: Converter | None) -> Converter:
    def convert(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a key is no text")
        if len(set(keys)) < len(keys):
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
        return {key: item if inner is None else inner(item) for key, item in pairs if item is not None}

    return convert


def _refusal(reason: str) -> Converter:
    def refuse(value: Any) -> Any:
        raise ValueError(reason)

    return refuse
