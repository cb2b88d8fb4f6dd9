"""Real multi-process gloo groups for tests. Processes are started once and reused by the tests of a module or folder.

    def test_shards_agree(ranks):            # fixture in tests/conftest.py
        results = ranks(2).run(_body, 3.0)   # _body(3.0) runs on 2 ranks; returns [result of rank 0, result of rank 1]

A body is a module-level function. It finds the default process group initialised (gloo) and Megatron's parallel state
uninitialised. An exception on any rank, or a rank that does not answer in time, fails the test and ends the processes; so
does a good end after which threads have worn them out. The next run starts others.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import tests.hypothesis_profiles  # noqa: F401  a rank's own process loads one too
from tests.forked_ranks import forkserver, free_port, rank_environment


def _reset_megatron() -> None:
    import sys

    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()


def _let_go_of_models() -> None:
    """What a test built goes with it, and its groups too: each has three threads, one of which polls.

    Megatron's DistributedDataParallel keeps autograd's nodes, and a token dispatcher tensors of the last graph; nodes keep
    hooks, and these the model: cycles that the collector cannot see, as they lead through C++.
    """
    for thing in gc.get_objects():
        name = type(thing).__name__
        if name == "DistributedDataParallel":
            vars(thing).get("grad_accs", []).clear()
        elif name.endswith("TokenDispatcher"):
            vars(thing).clear()
    gc.collect()


def _serve(rank: int, world_size: int, port: int, pipe: Any) -> None:
    os.environ.update(rank_environment(rank, world_size, port))
    torch.set_num_threads(1)
    gc.freeze()  # what was imported: half a second of a core after every job, to look through it for models
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, timeout=timedelta(seconds=120))
    for number in itertools.count():
        if (job := pipe.recv()) is None:
            return
        function, args = job
        try:
            # Fresh groups for every job: what one test leaves behind must not reach the next.
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(f"job{number}", store),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=120),
            )
            answer = (True, function(*args))
            _reset_megatron()
            dist.barrier()  # no rank may take its groups down while another still uses them
            dist.destroy_process_group()
            _let_go_of_models()
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send((*answer, len(os.listdir("/proc/self/task"))))


# What is left of a job's groups all the same adds up, and a dozen threads that poll take some percent of a core: after some
# tests the processes are replaced.
_MOST_THREADS = 40


class RankPool:
    """``world_size`` processes joined in one gloo group, waiting for functions to run. They are started when first needed."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.pipes: list[Any] = []
        self.processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        if not self.processes:
            self._start()
        results, failures, worn_out = [], [], False
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send((function, args))
            except OSError:
                failures.append(f"rank {rank}: {self._death(rank)}, before it was given {function.__qualname__}")
        asked = [] if failures else enumerate(self.pipes)
        for rank, pipe in asked:
            try:
                # Once one rank has failed the others probably wait for it in a collective: do not wait long for them.
                if not pipe.poll(5.0 if failures else timeout):
                    failures.append(f"rank {rank}: no answer in time")
                    continue
                fine, result, threads = pipe.recv()
            except (EOFError, OSError):
                fine, result, threads = False, self._death(rank), 0
            results.append(result)
            worn_out |= threads > _MOST_THREADS
            if not fine:
                failures.append(f"rank {rank}: {result}")
        if failures or worn_out:
            self.close(in_good_order=not failures)
        if failures:
            raise AssertionError("\n".join(failures))
        return results

    def _start(self) -> None:
        context = forkserver()
        port = free_port()
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, port, there), daemon=True)
            process.start()
            there.close()  # or the end of the process would not be the end of the pipe
            self.pipes.append(here)
            self.processes.append(process)

    def _death(self, rank: int) -> str:
        self.processes[rank].join(timeout=5.0)
        return f"the process died (exit code {self.processes[rank].exitcode})"

    def close(self, in_good_order: bool = True) -> None:
        """End the processes: those that wait for a job in good order, so that what they measured (coverage) is written."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # it died
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=20.0 if in_good_order else 0.0)
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.pipes, self.processes = [], []


class RankPools:
    """One pool per world size."""

    def __init__(self) -> None:
        self.pools: dict[int, RankPool] = {}

    def __call__(self, world_size: int) -> RankPool:
        return self.pools.setdefault(world_size, RankPool(world_size))

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
