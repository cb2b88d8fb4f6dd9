"""Whether a folder is the same one on every node: checkpoints are written by all of them and read by others."""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path

from megatron_dppo.distributed.collectives import broadcast_object, gather_objects, on_one_rank
from megatron_dppo.errors import ConfigError

_PATIENCE_S = 60.0  # of a node: network file systems tell of a new file with some delay
_EVERY_S = 0.5


def check_shared_folder(folder: Path, what: str) -> None:
    """Raise ConfigError on all ranks, naming the nodes, if some do not see what rank 0 writes to ``folder``.

    Collective over all ranks. ``what``: the option that names the folder.
    """
    proof = folder / f".seen-{broadcast_object(uuid.uuid4().hex)}"
    on_one_rank(proof.touch)
    is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
    blind = gather_objects(socket.gethostname() if is_first_of_node and not _appears(proof) else None)
    on_one_rank(lambda: proof.unlink(missing_ok=True))
    if nodes := sorted({node for node in blind if node is not None}):
        raise ConfigError(
            f"{what}: {folder} is not the same folder on all nodes; {', '.join(nodes)} did not see within {_PATIENCE_S:g} s"
            " what rank 0 wrote there. Name a folder on a file system that all nodes share"
        )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_EVERY_S)
    return True
