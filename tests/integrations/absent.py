"""Stand-ins for packages that a framework imports and that a recorded call never reaches (ray, servers, loggers).

A stand-in has every attribute, each of them a stand-in again: importing works, decorating hands the function back, and
anything that reads a number out of one fails.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any


class _AnyMember(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name)


class _Anything(metaclass=_AnyMember):
    """Takes any attribute, call and base class; hands a decorated function back; is false, as ``ray.is_initialized()`` is."""

    def __bool__(self) -> bool:
        return False

    def __or__(self, other: Any) -> Any:  # in annotations
        return other

    __ror__ = __or__

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else self

    def __class_getitem__(cls, _: Any) -> Any:
        return cls


class _StandIn(ModuleType):
    __path__: list[str] = []  # noqa: RUF012  a package, so that submodules are looked for
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything() if name[0].islower() else type(name, (_Anything,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if any(fullname == name or fullname.startswith(name + ".") for name in self.packages):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in_for(*packages: str) -> None:
    """From now on an import of one of ``packages``, or of anything in them, gives a stand-in."""
    sys.meta_path.insert(0, _Finder(packages))
