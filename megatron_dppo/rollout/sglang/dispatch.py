"""Which server a request goes to.

The samples of a prompt go to one server: it computes the prompt once and finds it in its cache for the others. Where there
are fewer prompts than servers, each prompt has several. Prompts go to whichever server has the least to do, and so does a
sample whose prompt's servers have far more to do than another.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager


def samples_together(servers: int, prompts: int, samples_per_prompt: int) -> int:
    """How many samples of a prompt are to be on one server: all, unless there are several servers for every prompt."""
    return -(-samples_per_prompt // max(1, servers // max(1, prompts)))


class Dispatch:
    """The requests that one replica has in flight, by server."""

    def __init__(self) -> None:
        self._in_flight: dict[str, int] = {}
        self._homes: dict[Hashable, list[str]] = {}  # prompt -> the servers that have it in their cache
        self._together = 1  # samples of a prompt that are to be on one server

    @property
    def urls(self) -> list[str]:
        """The servers that are asked."""
        return list(self._in_flight)

    def set_servers(self, urls: Iterable[str]) -> None:
        """From now on these, none of which has anything to do."""
        self._in_flight = dict.fromkeys(urls, 0)
        self._homes = {}

    def begin(self, prompts: int, samples_per_prompt: int) -> None:
        """For a new batch of so many prompts."""
        self._homes = {}
        self._together = samples_together(len(self._in_flight), prompts, samples_per_prompt)

    def drop(self, url: str) -> None:
        """Ask this server no more."""
        self._in_flight.pop(url, None)

    @contextmanager
    def server_for(self, prompt: Hashable) -> Iterator[str]:
        """The server for a sample of this prompt, which has it to do within. There must be a server left."""
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
