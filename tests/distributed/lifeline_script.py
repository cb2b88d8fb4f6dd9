"""What ranks of test_lifeline.py run: one of them meets with ``fault``, the others wait for something that never comes.

With a third argument they wait in a collective, whose connection breaks when that one has gone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack

import torch
import torch.distributed as dist

from megatron_dppo.distributed import lifeline
from megatron_dppo.distributed.ranks import joined_ranks
from megatron_dppo.errors import StopRequested

fault, who = sys.argv[1], int(sys.argv[2])
lifeline._SILENCE_S = 6.0  # type: ignore[misc]
lifeline._CLEAN_UP_S = 4.0  # type: ignore[misc]
with ExitStack() as stack:
    watch = stack.enter_context(joined_ranks(torch.device("cpu")))
    dist.barrier()  # a rank that is late would find the store gone
    if fault == "clean-up hangs":
        stack.callback(time.sleep, 600)
    stack.enter_context(watch.told_first())
    if fault in ("none", "stop"):  # all ranks are done, but not at the same time
        time.sleep(2.0 * dist.get_rank())
        if fault == "stop":
            raise StopRequested("asked to")
    elif dist.get_rank() != who:
        dist.barrier() if len(sys.argv) > 3 else time.sleep(600)
    elif fault == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "exit":
        os._exit(9)
    else:
        raise MemoryError("too much")
