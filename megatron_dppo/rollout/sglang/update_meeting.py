"""The store in which the ranks of a weight update find each other: what is ready, what was taken, who has failed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_dppo.rollout.sglang.update_group import open_store

_TAKEN, _WITHDRAWN = "taken", "withdrawn"
# Keys: what the first rank that failed says, and what is said of servers.
_FAILED, _SERVERS_FAILED = "failed", "servers failed"


class MeetingPlace(NamedTuple):
    """Where a store is, and a number that none has that is open in the same process.

    A trainer that is started again opens the same ones again, so that groups named after them are those that it left.
    """

    address: str
    port: int
    number: int


_open: set[int] = set()  # numbers of this process's own


@dataclass
class Meeting:
    """One process's connection to the store.

    Attributes:
        place: of the store.
        store: the connection. Who waits by it keeps all others of this process from it.
    """

    place: MeetingPlace
    store: TCPStore
    _updates: int = 0

    @classmethod
    def opened(cls, address: str, timeout: timedelta) -> Meeting:
        """The store itself, for the first process."""
        store = open_store(address, timeout)
        number = next(number for number in itertools.count() if number not in _open)
        _open.add(number)
        return cls(MeetingPlace(address, store.port, number), store)

    @classmethod
    def joined(cls, place: MeetingPlace, timeout: timedelta) -> Meeting:
        """A connection to a store that is open."""
        return cls(place, TCPStore(place.address, place.port, is_master=False, timeout=timeout))

    def close(self) -> None:
        """By the first process: another may have the number."""
        _open.discard(self.place.number)

    def begin_update(self) -> None:
        """What was noted for the one before is not read any more. Every process counts by itself."""
        self._updates += 1

    def _key(self, *parts: object) -> str:
        return "/".join(str(part) for part in (self._updates, *parts))

    def _is_set(self, key: str) -> bool:
        return bool(self.store.check([key]))

    # A server that is told of a bucket waits for its bytes, whatever becomes of their sender. So a bucket is offered by its
    # sender first, and then either rank 0 takes it or the sender withdraws it: whoever is first in the store.

    def offer(self, index: int) -> None:
        """Say that a bucket is ready."""
        self.store.set(self._key("offered", index), "")

    def is_offered(self, index: int) -> bool:
        """Whether a bucket is ready."""
        return self._is_set(self._key("offered", index))

    def take(self, index: int) -> bool:
        """Settle that an offered bucket is used. False: it was withdrawn."""
        self.store.delete_key(self._key("offered", index))
        return self._settle(index, _TAKEN)

    def withdraw(self, index: int) -> bool:
        """Settle that it is not. False: it was taken."""
        return self._settle(index, _WITHDRAWN)

    def _settle(self, index: int, outcome: str) -> bool:
        return bool(self.store.compare_set(self._key("settled", index), "", outcome) == outcome.encode())

    def is_wanted(self, index: int) -> bool:
        """Whether it was taken; asked by its sender until it is so."""
        key = self._key("settled", index)
        return bool(self._is_set(key) and self.store.delete_key(key))

    # Where every rank has a bucket of its own copy, each hands in how it is found.

    def hand_in(self, index: int, rank: int, handles: str) -> None:
        """Say where a rank's copy of a bucket is."""
        self.store.set(self._key("handles", index, rank), handles)

    def are_handed_in(self, index: int, ranks: Iterable[int]) -> bool:
        """Whether all of these ranks have said it."""
        return bool(self.store.check([self._key("handles", index, rank) for rank in ranks]))

    def collect(self, index: int, ranks: Iterable[int]) -> list[str]:
        """What they have said, once. By then all of them have seen that the bucket was offered."""
        keys = [self._key("handles", index, rank) for rank in ranks]
        handles = [self.store.get(key).decode() for key in keys]
        for key in (*keys, self._key("offered", index)):
            self.store.delete_key(key)
        return handles

    def set_loaded(self, buckets: int) -> None:
        """Say that so many buckets have arrived, and that nobody reads them any more."""
        self.store.set(self._key("loaded"), str(buckets))

    def loaded(self) -> int:
        """How many have."""
        key = self._key("loaded")
        return int(self.store.get(key)) if self._is_set(key) else 0

    def tell_failure(self, error: Exception, of_servers: bool = False) -> None:
        """Let all others know that this rank can do no more, or that servers cannot. The first failure of each kind stays."""
        with contextlib.suppress(RuntimeError):  # whose store it is may be gone
            self.store.compare_set(self._key(_SERVERS_FAILED if of_servers else _FAILED), "", f"{error}")

    def failure(self) -> str | None:
        """What any rank has told of itself."""
        return self._told(_FAILED)

    def failure_of_servers(self) -> str | None:
        """What was told of servers, all of which have heard the last then."""
        return self._told(_SERVERS_FAILED)

    def _told(self, what: str) -> str | None:
        key = self._key(what)
        return self.store.get(key).decode() if self._is_set(key) else None
