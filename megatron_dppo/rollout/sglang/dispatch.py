"""Which server a request goes to.

The samples of a prompt go to one server: it computes the prompt once and finds it in its cache for the others. Prompts go to
whichever server has the least to do, and so does a sample whose prompt's server has far more to do than another.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager


class Dispatch:
    """The requests that one replica has in flight, by server."""

    def __init__(self) -> None:
        self._in_flight: dict[str, int] = {}
        self._home: dict[Hashable, str] = {}  # prompt -> the server that has it in its cache
        self._samples_per_prompt = 1

    @property
    def urls(self) -> list[str]:
        """The servers that are asked."""
        return list(self._in_flight)

    def set_servers(self, urls: Iterable[str]) -> None:
        """From now on these, none of which has anything to do."""
        self._in_flight = dict.fromkeys(urls, 0)
        self._home = {}

    def begin(self, samples_per_prompt: int) -> None:
        """For a new batch of prompts."""
        self._home = {}
        self._samples_per_prompt = samples_per_prompt

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
        idlest = min(self._in_flight, key=lambda url: self._in_flight[url])
        home = self._home.get(prompt)
        if home not in self._in_flight:
            self._home[prompt] = idlest
            return idlest
        assert home is not None
        # What a prompt brings at once is no imbalance.
        ahead = self._in_flight[home] - self._in_flight[idlest]
        return home if ahead < self._samples_per_prompt else idlest
