"""A job on this machine: an agent for every trainer node over the loopback device, and the servers of all serving nodes.

What a scheduler does on a cluster this process does here: it starts them, hands requests to stop on, keeps their logs, starts
a run again that was asked to stop and has saved, and ends everything that it started, always, even if it is killed itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

import psutil
import torch

from megatron_dppo.errors import EXIT_START_AGAIN, ConfigError
from megatron_dppo.launch.attempt import Attempt
from megatron_dppo.launch.environment import SERVER, TRAINER
from megatron_dppo.launch.exit_codes import exit_code_of
from megatron_dppo.launch.followed_log import FollowedLog
from megatron_dppo.launch.job import Job
from megatron_dppo.launch.local_commands import LOOPBACK, local_trainer_command
from megatron_dppo.rollout.sglang.servers.guarded_process import GuardedProcess
from megatron_dppo.rollout.sglang.servers.scratch import Scratch

_LOOK_EVERY_S = 0.2
_OTHERS_GRACE_S = 60.0  # of the other nodes, once one has ended: the ranks end by themselves in half of it
_SERVER_GRACE_S = 7.0  # `serve` gives its servers the usual grace of a process
_MARK = "MEGATRON_DPPO_ATTEMPT"  # in the environment of everything that was started


class LocalJob:
    """Runs a job until it is done, or was asked to end."""

    def __init__(self, job: Job) -> None:
        """Raises ConfigError if this machine cannot hold the job."""
        self._job = job
        self._asked_to_end = 0  # how often
        self._asked_to_save = False
        if job.serving and job.serving.nodes_per_server > 1:
            raise ConfigError("launch.executor=local: a server that is larger than a node needs more than this machine")
        needed = job.launch.gpus_per_node * (job.launch.trainer_nodes + job.launch.server_nodes)
        if needed > torch.cuda.device_count():
            raise ConfigError(
                f"launch.executor=local: {job.launch.trainer_nodes} + {job.launch.server_nodes} nodes of"
                f" {job.launch.gpus_per_node} GPUs, but this machine has {torch.cuda.device_count()}: choose cluster=slurm,"
                " fewer nodes, or launch.gpus_per_node=0 for CPU processes"
            )

    def run(self) -> int:
        """Returns the exit code: 0, or why the run has ended; 75 if it would go on and is not started again."""
        folder = self._job.folder / f"local-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
        with self._listening():
            start = 1
            while True:
                code = self._attempt(Attempt(folder / f"start-{start}"))
                if code != EXIT_START_AGAIN or self._asked_to_end:
                    return code
                if start > self._job.launch.max_restarts:
                    print(f"launch.max_restarts = {self._job.launch.max_restarts}: not started again", flush=True)
                    return code
                start += 1
                print(f"the run has saved and goes on: start {start}", flush=True)

    def _attempt(self, attempt: Attempt) -> int:
        self._asked_to_save = False
        attempt.folder.mkdir(parents=True)
        print(f"logs: {attempt.folder}", flush=True)
        with contextlib.ExitStack() as stack:
            stack.callback(_end_marked, attempt)
            servers = stack.enter_context(self._servers(attempt))
            trainers = stack.enter_context(self._trainers(attempt))
            with FollowedLog(attempt.log(TRAINER, 0), sys.stdout):
                servers_code = self._watch(attempt, trainers, servers)
        codes = [_exit_code(attempt, node, trainer) for node, trainer in enumerate(trainers)]
        if servers_code:
            print(f"error: the servers ended first: see {attempt.log(SERVER, 0)}", file=sys.stderr, flush=True)
        return servers_code or exit_code_of(codes)

    def _watch(self, attempt: Attempt, trainers: list[GuardedProcess], servers: GuardedProcess | None) -> int:
        """Until the trainer has ended, or its time to do so is over. Returns the servers' exit code if they ended first."""
        servers_code, deadline = 0, float("inf")
        while any(trainer.is_running() for trainer in trainers) and time.monotonic() < deadline:
            if servers is not None and not servers_code and not servers.is_running():
                servers_code = servers.exit_code or EXIT_START_AGAIN
            wanted = self._asked_to_end or self._asked_to_save or servers_code
            if wanted and not attempt.stop_file.exists():
                attempt.stop_file.touch()
                deadline = min(deadline, time.monotonic() + self._job.launch.warning_s)
            if not all(trainer.is_running() for trainer in trainers):
                deadline = min(deadline, time.monotonic() + _OTHERS_GRACE_S)
            if self._asked_to_end > 1:
                break
            time.sleep(_LOOK_EVERY_S)
        return servers_code

    @contextmanager
    def _servers(self, attempt: Attempt) -> Iterator[GuardedProcess | None]:
        """Those of all serving nodes, by one command."""
        serving = self._job.serving
        if serving is None:
            yield None
            return
        command = self._job.all_servers_command(attempt=str(attempt.folder), address=LOOPBACK)
        environment = self._environment(SERVER, attempt, self._job.launch.trainer_nodes, serving.nodes)
        scratch = Scratch(environment)
        process = GuardedProcess(command, attempt.log(SERVER, 0), scratch.environment, _SERVER_GRACE_S, scratch)
        try:
            yield process
        finally:
            process.end()

    @contextmanager
    def _trainers(self, attempt: Attempt) -> Iterator[list[GuardedProcess]]:
        port = str(self._job.launch.port or _free_port())
        trainers: list[GuardedProcess] = []
        try:
            for node in range(self._job.launch.trainer_nodes):
                command = local_trainer_command(self._job, node, port=port, attempt=str(attempt.folder))
                environment = self._environment(TRAINER, attempt, node, 1)
                scratch = Scratch(environment)
                trainers.append(
                    GuardedProcess(command, attempt.log(TRAINER, node), scratch.environment, scratch=scratch)
                )
            yield trainers
        finally:
            for trainer in trainers:
                trainer.ask_to_end()
            for trainer in trainers:
                trainer.end()

    def _environment(self, role: str, attempt: Attempt, first_node: int, nodes: int) -> dict[str, str]:
        """``first_node``, ``nodes``: whose GPUs of this machine the process is to see."""
        own = {variable.name: variable.value for variable in self._job.environment[role]}
        environment = {**os.environ, **own, _MARK: str(attempt.folder)}
        if gpus := self._job.launch.gpus_per_node:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            chosen = visible.split(",")[first_node * gpus : (first_node + nodes) * gpus]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        return environment

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Within: SIGTERM, SIGHUP and Ctrl-C end the job, saved, a second one at once; SIGUSR1: save and start again."""

        def end(number: int, frame: FrameType | None) -> None:
            self._asked_to_end += 1

        def save(number: int, frame: FrameType | None) -> None:
            self._asked_to_save = True

        handlers: dict[signal.Signals, Any] = {signal.SIGTERM: end, signal.SIGHUP: end, signal.SIGINT: end}
        handlers[signal.SIGUSR1] = save
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _exit_code(attempt: Attempt, node: int, trainer: GuardedProcess) -> int:
    """As the agent has written it; of one that was killed, its process's own."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(attempt.exit_code_file(node).read_text(encoding="utf-8"))
    return trainer.exit_code or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _end_marked(attempt: Attempt) -> None:
    """Kill what is left: ranks and helpers are in sessions of their own, and an agent that was killed could not end them."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == str(attempt.folder):
                process.kill()
