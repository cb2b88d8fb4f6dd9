"""Runs a command as the leader of its own process group and ends the whole group when the process that asked is gone.

A trainer that is killed with SIGKILL cannot clean up, and a server's worker processes can outlive the server. So the
trainer starts ``python guard.py <trainer's pid> <command...>`` in a new session: this process only waits, and
takes the group down when its parent changes. Standard library only; never imported.
"""

import os
import signal
import subprocess
import sys
import time

POLL_S = 0.5
GRACE_S = 3.0


def _end_group() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE_S)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Return the command's exit code, 128 + signal if one ended it, unless the parent goes first."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    child = subprocess.Popen(command)
    while os.getppid() == parent:
        try:
            code = child.wait(timeout=POLL_S)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            continue
    _end_group()
    return 1


if __name__ == "__main__":
    sys.exit(main())
