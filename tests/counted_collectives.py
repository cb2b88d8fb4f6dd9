"""Which collectives a piece of code calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist

ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # by torch version
COLLECTIVES = (
    "all_gather",
    ALL_GATHER,
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce_scatter_tensor",
)


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """Names of the collectives called inside."""
    called: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            original = getattr(dist, name)

            def count(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                called.append(_name)
                return _original(*args, **kwargs)

            stack.enter_context(mock.patch.object(dist, name, count))
        yield called
