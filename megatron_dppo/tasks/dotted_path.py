"""Load an object that a config names by dotted path."""

from __future__ import annotations

import importlib
from typing import Any

from megatron_dppo.errors import TaskError


def load_object(path: str, purpose: str) -> Any:
    """The object at ``package.module:name`` (or ``package.module.name``).

    Raises TaskError, naming ``purpose`` and ``path``, when the module cannot be imported or has no such name.
    """
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not name:
        raise TaskError(f"{purpose} {path!r} is no dotted path; write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when imported
        raise TaskError(
            f"{purpose} {path!r}: importing {module_name} failed with {type(error).__name__}: {error}. "
            "The module must be installed or on PYTHONPATH"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise TaskError(f"{purpose} {path!r}: the module {module_name} has no {name}") from None
