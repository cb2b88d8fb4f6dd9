"""One line on the terminal for what all ranks have to say, before any process group exists or after it broke.

Ranks that read the same bad input fail alike, each in its own time, and torchrun ends the others as soon as the first is
gone: if only rank 0 spoke, a slow rank 0 would be ended before it did. So whoever comes first speaks.
"""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_dppo.distributed.ranks import world_size

_TIMEOUT = timedelta(seconds=10)


def is_first_to_say(message: str) -> bool:
    """Whether no other rank has asked this for the same ``message``: True on exactly one rank of all nodes.

    The ranks meet in the store that torchrun keeps for them, in each of its restarts anew. Where it cannot be reached, every
    rank is the first: said often is better than never.
    """
    if world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"megatron_dppo/said/{restart}/{hashlib.sha256(message.encode(errors='replace')).hexdigest()}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=_TIMEOUT)
        return int(store.add(key, 1)) == 1
    except (KeyError, ValueError, RuntimeError):  # torch's own errors are RuntimeErrors
        return True
