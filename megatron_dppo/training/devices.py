"""Whether the trainer has its devices to itself, or shares them with the servers that generate for it.

share          generate | make_room: servers give up KV cache and weights, the update's memory comes back | update |
               put_away: it goes to the host | sync: servers take back weights, get and prove the new ones, then KV cache
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from megatron_dppo.distributed.collectives import max_over_ranks
from megatron_dppo.training.policy.update_memory import UpdateMemory

# The name of a phase -> a context in which its time is taken.
Timed = Callable[[str], AbstractContextManager[None]]


class Devices(Protocol):
    """What a training loop has to know of them."""

    def for_update(self, memory: UpdateMemory, timed: Timed) -> AbstractContextManager[None]:
        """Within: the policy can be updated, and nothing can be generated. Collective.

        Afterwards the engine has to be given weights before it generates. ``memory`` is that of the update.
        """
        ...

    def metrics(self, memory: UpdateMemory) -> dict[str, float]:
        """What there is to report of a step. Collective."""
        ...


class OwnDevices:
    """Nobody else uses them."""

    @contextmanager
    def for_update(self, memory: UpdateMemory, timed: Timed) -> Iterator[None]:
        """See ``Devices``."""
        yield

    def metrics(self, memory: UpdateMemory) -> dict[str, float]:
        """See ``Devices``."""
        return {}


class SharedDevices:
    """Servers use them in turns with the trainer."""

    def __init__(self, release_servers: Callable[[], None]) -> None:
        """``release_servers`` lets the servers give their memory up until weights are sent to them. Collective."""
        self._release_servers = release_servers

    @contextmanager
    def for_update(self, memory: UpdateMemory, timed: Timed) -> Iterator[None]:
        """See ``Devices``. After an error the memory stays where it is: the run ends."""
        with timed("make_room"):
            self._release_servers()
            memory.bring_back()
        yield
        with timed("put_away"):
            memory.put_away()

    def metrics(self, memory: UpdateMemory) -> dict[str, float]:
        """See ``Devices``: of the rank with the most of each."""
        report = memory.report
        moved, dropped, stays = max_over_ranks([report.moved, report.dropped, report.stays])
        return {"memory/moved_bytes": moved, "memory/dropped_bytes": dropped, "memory/stays_bytes": stays}
