"""Frameworks that are not installed here: modules with the names that an adapter imports, and what it takes from them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Have ``import NAME`` find a module with these attributes, for the time of a test."""
    for name, attributes in modules.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Have ``import NAME`` fail as if it were not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
