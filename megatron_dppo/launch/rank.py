"""One trainer process of a launched run: ``python -m megatron_dppo.launch.rank ...`` is ``megatron-dppo train ...``.

In addition it saves and ends if the agent that started it is killed, which torchrun's own ranks outlive, as each is in a
session of its own; and it ends well when it is asked to stop before the run listens for that.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from megatron_dppo.errors import EXIT_START_AGAIN

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have this process asked to stop (SIGTERM) when its parent ends; ``parent``: who that is meant to be."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before
        os._exit(EXIT_START_AGAIN)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(
            number, lambda *_: os._exit(EXIT_START_AGAIN)
        )  # nothing has begun; the run has handlers of its own
    end_with_parent(int(os.environ["MEGATRON_DPPO_AGENT"]))
    from megatron_dppo.train import main as train

    return train(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
