"""Real training runs on four forked ranks to which one fault of faults.py happens, and how they end."""

from __future__ import annotations

import contextlib
import runpy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from torch.distributed import TCPStore

from megatron_dppo.tasks.config import TaskConfig
from tests.forked_ranks import rank_environment, start_ranks
from tests.training.faults import STEPS, Fault
from tests.training.tiny_runs import ROOT, training_arguments

SCRIPT = Path(__file__).with_name("faulty_run_script.py")
RANKS = 4
LAYOUTS = {"DP2 TP2": 2, "DP4": 1}  # ranks of a replica
_TASK = "name: counting, kind: custom, path: 'tests.training.counting_task:CountingTask'"
_SETTINGS = (
    "parallel.expert_model_parallel_size=1",
    f"tasks.train=[{{{_TASK}, size: 100, seed: 100}}]",
    f"tasks.eval=[{{{_TASK}, size: 4, seed: 10}}]",
    f"train.steps={STEPS}",
    "train.updates_per_rollout=1",
    "train.micro_batch_size=8",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=2",
    "rollout.max_response_tokens=6",
    "warm_start.steps=0",
    "eval.prompts=4",
    "eval.every=0",
    "checkpoint.every=0",
    "logging.tensorboard=false",
)
_START_S = 200.0  # for a run to begin and come to the step of the fault, or to its end where nothing happens
_STORE_TIMEOUT = timedelta(seconds=30)


@dataclass(frozen=True)
class Ending:
    """How a run has ended.

    Attributes:
        codes: the exit code of each rank, minus the signal if one ended it.
        output: of all ranks.
        seconds: from the fault until no process of the run was left.
        left: processes that were there too long, and were killed.
    """

    codes: list[int | None]
    output: str
    seconds: float
    left: list[str]


def write_policy(folder: Path) -> Path:
    """One dense layer: what can go wrong around a policy does not depend on it."""
    tool = runpy.run_path(str(ROOT / "tools" / "setup" / "make_tiny_policy.py"))
    size = tool["TinyPolicySize"](layers=1, hidden_size=32, head_dim=8, ffn_size=32, max_positions=128)
    task = TaskConfig(name="counting", kind="custom", path="tests.training.counting_task:CountingTask", size=50)
    tool["make_tiny_policy"](folder, [task], "qwen3", size)
    return folder


def ranks_of(fault: Fault, layout: str, replica: int) -> list[int]:
    """The ranks that a fault on a replica happens to."""
    size = LAYOUTS[layout]
    if fault.where == "all":
        return list(range(RANKS))
    return [replica * size + (size - 1 if fault.where == "last of a replica" else 0)]


def run(
    policy: Path,
    folder: Path,
    layout: str,
    *settings: str,
    fault: Fault | None = None,
    ranks: Sequence[int] = (),
    silence_s: float | None = None,
) -> Ending:
    """Start the run in ``folder``, or go on with it, and see it end; what does not end in time is killed.

    ``silence_s``: of a rank, after which it is taken to be dead; None: as long as in every run.
    """
    happened, log = folder / "fault", folder / f"ranks-{time.monotonic_ns()}.log"
    what = ["none" if fault is None else fault.name, ",".join(map(str, ranks)), str(silence_s or "")]
    tensor_parallel = f"parallel.tensor_model_parallel_size={LAYOUTS[layout]}"
    arguments = training_arguments(policy, folder, "run", *_SETTINGS, tensor_parallel, *settings)
    # The store is here, as torchrun's agent has it: it outlives every rank.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT)
    of_agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    environments = [rank_environment(rank, RANKS, store.port) | of_agent for rank in range(RANKS)]
    processes = start_ranks(SCRIPT, [*what, *arguments], environments, folder=folder, log=log)
    deadline = time.monotonic() + _START_S
    ends_soon = fault is not None and not fault.goes_on
    while running := _running(processes, folder):
        if ends_soon and happened.exists():
            deadline = min(deadline, _time_of(happened) + fault.seconds)
        if time.monotonic() > deadline:
            break
        wait([process.sentinel for process in processes if process.exitcode is None], timeout=0.2)
    seconds = time.monotonic() - _time_of(happened) if happened.exists() else 0.0
    left = [str(process) for process in running]
    for process in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    return Ending(codes, log.read_text(encoding="utf-8", errors="replace"), seconds, left)


def _running(ranks: Sequence[BaseProcess], folder: Path) -> list[psutil.Process]:
    """Of a run's ranks and whatever they started, which is all in its folder."""
    of_ranks = {process.pid for process in ranks if process.exitcode is None}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid in of_ranks or (process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder):
                found.append(process)
        except psutil.Error:  # it has gone meanwhile
            continue
    return found


def _time_of(happened: Path) -> float:
    """The time at which the fault happened, on the first rank if on several."""
    return min(map(float, happened.read_text().split()), default=time.monotonic())
