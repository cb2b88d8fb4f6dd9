"""A process that makes what a server makes on its host, by the same names, and nothing else of a server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_dppo.rollout.sglang.servers.guarded_process import GuardedProcess
from megatron_dppo.rollout.sglang.servers.scratch import Scratch
from tests.waiting import wait_until

# As a server does: a worker has made a queue, both have a file of the server's load, the first has a file in TMPDIR.
_SERVER = """
import mmap, os, sys, tempfile, time
token, *words = sys.argv[1:]
def made(name):
    fd = os.open(f"/dev/shm/{name}", os.O_CREAT | os.O_RDWR, 0o600)
    os.ftruncate(fd, 4096)
    return mmap.mmap(fd, 4096)
_, path = tempfile.mkstemp(prefix=token)
load = made(f"sglang_loads_{token}.shm")
if os.fork() == 0:
    queue = made(f"sgl_shm_mq_{os.getpid()}_{token}")
    if "opens" in words:
        other = made(words[words.index("opens") + 1])
    time.sleep(1000)
if "ends" in words:
    notes = os.environ["TMPDIR"] + "/shared_memory"
    while not os.path.exists(notes) or open(notes).read().count(token) < 2:
        time.sleep(0.05)
    sys.exit(1)
time.sleep(1000)
"""


def _noted(folder: Path) -> str:
    notes = folder / "shared_memory"
    return notes.read_text() if notes.exists() else ""


class LeavingServer:
    """It has made everything when this returns."""

    def __init__(self, folder: Path, token: str, *words: str) -> None:
        """Its log is in ``folder``.

        Args:
            token: eight hexadecimal digits, in the names of what it makes: two files in shared memory, one in TMPDIR.
            words: "ends": by itself, when both are noted, and leaves its worker; "opens", name: also a file that is there.
        """
        self.scratch = Scratch(os.environ)
        command = [sys.executable, "-c", _SERVER, token, *words]
        self.process = GuardedProcess(command, folder / "log", self.scratch.environment, scratch=self.scratch)
        wait_until(lambda: _noted(self.scratch.folder).count(token) == 2, within_s=20, what="its files are noted")
        assert [path.name for path in self.scratch.folder.glob(f"{token}*")] != []
