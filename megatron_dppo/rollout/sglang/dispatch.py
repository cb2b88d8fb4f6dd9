"""Which server a request goes to.

The samples of a prompt go to one server: it computes the prompt once and finds it in its cache for the others. Where there
are fewer prompts than servers, each prompt has several. Prompts go to whichever server has the least to do, and so does a
sample whose prompt's servers have far more to do than another. Where a router stands before the servers, it chooses.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


def samples_together(servers: int, prompts: int, samples_per_prompt: int) -> int:
    """How many samples of a prompt are to be on one server: all, unless there are several servers for every prompt."""
    return -(-samples_per_prompt // max(1, servers // max(1, prompts)))


class Dispatch(Protocol):
    """Where one replica sends its requests."""

    @property
    def urls(self) -> list[str]:
        """The servers that are asked."""
        ...

    def set_servers(self, urls: Iterable[str]) -> None:
        """From now on these, none of which has anything to do."""
        ...

    def begin(self, prompts: int, samples_per_prompt: int) -> None:
        """For a new batch of so many prompts."""
        ...

    def drop(self, url: str) -> None:
        """Ask this server no more."""
        ...

    def address_for(self, prompt: Hashable) -> AbstractContextManager[str]:
        """Where a sample of this prompt is asked for, within. There must be a server left."""
        ...


class DirectDispatch:
    """To servers, chosen here. Knows what this replica has in flight on each."""

    def __init__(self) -> None:
        self._in_flight: dict[str, int] = {}
        self._homes: dict[Hashable, list[str]] = {}  # prompt -> the servers that have it in their cache
        self._together = 1  # samples of a prompt that are to be on one server

    @property
    def urls(self) -> list[str]:
        """See ``Dispatch.urls``."""
        return list(self._in_flight)

    def set_servers(self, urls: Iterable[str]) -> None:
        """See ``Dispatch.set_servers``."""
        self._in_flight = dict.fromkeys(urls, 0)
        self._homes = {}

    def begin(self, prompts: int, samples_per_prompt: int) -> None:
        """See ``Dispatch.begin``."""
        self._homes = {}
        self._together = samples_together(len(self._in_flight), prompts, samples_per_prompt)

    def drop(self, url: str) -> None:
        """See ``Dispatch.drop``."""
        self._in_flight.pop(url, None)

    @contextmanager
    def address_for(self, prompt: Hashable) -> Iterator[str]:
        """The server for a sample of this prompt, which has it to do within."""
        url = self._choose(prompt)
        self._in_flight[url] += 1
        try:
            yield url
        finally:
            if url in self._in_flight:
                self._in_flight[url] -= 1

    def _choose(self, prompt: Hashable) -> str:
        idlest = min(self._in_flight, key=self._in_flight.__getitem__)
        homes = self._homes.setdefault(prompt, [])
        for home in sorted((url for url in homes if url in self._in_flight), key=self._in_flight.__getitem__):
            # What a prompt brings at once is no imbalance.
            if self._in_flight[home] - self._in_flight[idlest] < self._together:
                return home
        homes.append(idlest)
        return idlest


class RoutedDispatch:
    """To a router, which chooses."""

    def __init__(self, router: str) -> None:
        """``router``: its address."""
        self._router = router
        self._servers: list[str] = []

    @property
    def urls(self) -> list[str]:
        """Those that the router may choose."""
        return list(self._servers)

    def set_servers(self, urls: Iterable[str]) -> None:
        """See ``Dispatch.set_servers``."""
        self._servers = list(urls)

    def begin(self, prompts: int, samples_per_prompt: int) -> None:
        """Nothing is to be planned."""

    def drop(self, url: str) -> None:
        """See ``Dispatch.drop``. Whoever drops it tells the router."""
        self._servers = [server for server in self._servers if server != url]

    @contextmanager
    def address_for(self, prompt: Hashable) -> Iterator[str]:
        """The router's."""
        yield self._router
