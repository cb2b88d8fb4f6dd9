"""Runs a command as the leader of its own process group and ends the whole group when the process that asked is gone.

A trainer that is killed with SIGKILL cannot clean up, and a server's worker processes can outlive the server. So the
trainer starts ``python guard.py <trainer's pid> <folder> <command...>`` in a new session: this process only waits, and
takes the group down when its parent changes. With a folder (``scratch.py``; "": none) it notes meanwhile what the group
makes in shared memory, and sees to it that the folder is removed. Standard library only; never imported.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 0.2
GRACE_S = 3.0


def _load_scratch() -> Any:
    """By its path: importing it from its package would import torch."""
    spec: Any = importlib.util.spec_from_file_location("scratch", Path(__file__).with_name("scratch.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _end_group() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE_S)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Return the command's exit code, 128 + signal if one ended it, unless the parent goes first."""
    parent, folder, command = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    scratch = _load_scratch() if sys.argv[2] else None
    notes = scratch.Notes(folder) if scratch else None
    child = subprocess.Popen(command)
    while os.getppid() == parent:
        try:
            code = child.wait(timeout=POLL_S)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if notes:
                notes.look()
    if scratch:
        scratch.leave_behind(folder)
    _end_group()
    return 1


if __name__ == "__main__":
    sys.exit(main())
