"""Finds what makes the host wait for a device: operators whose result, or whose result's size, it has to know at once.

    with DeviceWaits() as waits: ...
    waits.found        # [(operator, the innermost frame that is neither torch's nor this file's)]

On a CPU nothing has to be waited for, but the same operators are dispatched, so a CPU shows what would stall a GPU.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ALWAYS = (
    "_local_scalar_dense",
    "argwhere",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
)
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in _ALWAYS:
        return True
    if name in _INDEXED:  # a boolean index has as many rows as it has True values
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name == "repeat_interleave" and kwargs.get("output_size") is None


# Methods that bring values to the host. On a CPU tensor they dispatch no operator, so they are watched by name.
_METHODS = {getattr(torch.Tensor, name) for name in ("tolist", "numpy", "cpu", "__array__", "__repr__", "__format__")}


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS:
            self.found.append((func.__name__, _caller()))
        return func(*args, **(kwargs or {}))


class DeviceWaits(TorchDispatchMode):
    """Records the operators and methods that wait, and who called them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.operators = 0  # how many were dispatched, waiting or not
        self._methods = _Methods(self.found)

    def __enter__(self) -> DeviceWaits:
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._methods.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        name = func.overloadpacket.__name__
        if _waits(name, args, kwargs or {}):
            self.found.append((name, _caller()))
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            return f"{frame.filename}:{frame.name}"
    return "?"
