"""Where servers come from: started here, started on other hosts by a command, found in a registry, or named by address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_dppo.rollout.sglang.servers.software import Software


@dataclass(frozen=True)
class Found:
    """What a source knows of its servers at one moment.

    Attributes:
        urls: of servers that were ready when their source last looked; whether they answer now is for the pool to ask.
        awaited: what will, or may, still become ready, in words.
        failures: why servers that were started will not become ready.
    """

    urls: tuple[str, ...]
    awaited: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()


class ServerSource(Protocol):
    """Used by the rank that owns the pool. Nothing here waits for a server to become ready."""

    @property
    def expected(self) -> int:
        """How many servers there have to be at the start of a run."""
        ...

    def start(self) -> None:
        """Start what this source starts, or what of it has ended. Raises RolloutError if that cannot even be tried."""
        ...

    def find(self) -> Found:
        """Look. Called again and again while servers are waited for, and before every weight update."""
        ...

    def end(self, url: str) -> None:
        """End a server, if it is this source's to end; ``start`` starts it again."""
        ...

    def software_of(self, url: str) -> Software | None:
        """What a server that is ready runs on; None if that is not known here."""
        ...

    def close(self) -> None:
        """End what was started. Safe to call twice."""
        ...


class NamedServers:
    """Servers that somebody else starts, at known addresses."""

    def __init__(self, urls: Sequence[str]) -> None:
        """``urls``: e.g. ``http://10.0.0.5:30000``."""
        self._urls = tuple(urls)

    @property
    def expected(self) -> int:
        """All of them."""
        return len(self._urls)

    def start(self) -> None:
        """Nothing is to be started."""

    def find(self) -> Found:
        """The same every time."""
        return Found(self._urls)

    def end(self, url: str) -> None:
        """They are not this process's to end."""

    def software_of(self, url: str) -> None:
        """It is not known."""

    def close(self) -> None:
        """Nothing was started."""
