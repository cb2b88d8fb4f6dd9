"""A word that any rank leaves for all others, whatever they are doing, and that they read without waiting for anybody."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

_STORE_TIMEOUT = timedelta(seconds=10)


def connect_to_store() -> TCPStore:
    """A connection of its own to the store where the ranks met: who waits for an answer holds up nobody else."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=_STORE_TIMEOUT)


def start_key(*parts: object) -> str:
    """A key in that store of this start of the ranks: torchrun may start them again with the same store."""
    return "/".join(["megatron_dppo", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), *map(str, parts)])


class Notice:
    """Made by every rank when the ranks have met. The first word stays. Safe to use from any thread."""

    def __init__(self, name: str) -> None:
        """``name``: of what it is about, the same on all ranks."""
        self._key = start_key("notice", name)
        self._store = connect_to_store()

    def leave(self, word: str) -> None:
        """Say it to all ranks."""
        with contextlib.suppress(RuntimeError):  # whose store it is has gone: nobody is there to read it
            self._store.compare_set(self._key, "", word)

    def read(self) -> str | None:
        """What any rank has said."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([self._key]):
                return self._store.get(self._key).decode()
        return None
