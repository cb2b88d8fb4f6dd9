"""A place where a run's numbers go, and the guard that keeps a broken one from the run.

Files of the run folder and what people watch have nothing to do with training: a full disk, a port in use or a service that
cannot be reached is said once, and the run goes on without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

Metrics = Mapping[str, float | str]


class Sink(Protocol):
    """Takes metrics. Whatever it raises is the guard's to deal with."""

    def record(self, step: int, metrics: Metrics) -> None:
        """A step's metrics, numbers and texts; numbers may be NaN or infinite."""

    def close(self) -> None:
        """Write what is left and let go of files, ports and processes."""


class Guarded:
    """Calls what may fail; says the first failure of each thing, and does not let it out."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()

    def attempt(self, name: str, action: Callable[[], object]) -> bool:
        """Whether ``action`` was done. ``name``: of the thing that it is for, as a person calls it."""
        try:
            action()
        except Exception as error:
            if name not in self._said:
                self._said.add(name)
                self._say(f"{name} failed, and the run goes on without: {type(error).__name__}: {error}")
            return False
        return True


class GuardedSinks:
    """Some sinks; one that cannot be opened or fails once is closed and gets nothing more.

    Args:
        guard: what calls them.
        factories: {name: how to open it}. Each is asked for a sink at once.
    """

    def __init__(self, guard: Guarded, factories: Mapping[str, Callable[[], Sink]]) -> None:
        self._guard = guard
        self._sinks: dict[str, Sink] = {}
        for name, factory in factories.items():

            def open_one(name: str = name, factory: Callable[[], Sink] = factory) -> None:
                self._sinks[name] = factory()

            guard.attempt(name, open_one)

    def record(self, step: int, metrics: Metrics) -> None:
        """Give a step's metrics to each that still works."""
        for name, sink in list(self._sinks.items()):

            def give(sink: Sink = sink) -> None:
                sink.record(step, metrics)

            if not self._guard.attempt(name, give):
                del self._sinks[name]
                self._guard.attempt(name, sink.close)

    def close(self) -> None:
        """Close each that still works."""
        for name, sink in self._sinks.items():
            self._guard.attempt(name, sink.close)
        self._sinks = {}
