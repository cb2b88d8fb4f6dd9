"""Packages that only an extra of setup.py installs: where one is absent, the error says which extra to install."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_dppo.errors import MissingDependencyError


@contextlib.contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Put around the import of a package of ``extra``. Raises MissingDependencyError where the package is absent."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise MissingDependencyError(
            f"{package} is not installed; it comes with an extra: pip install 'megatron-dppo[{extra}]'", name=error.name
        ) from error
