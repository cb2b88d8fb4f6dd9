"""A trainer node: torchrun's agent for the ranks of one host, that a scheduler can talk to.

Three things that ``torchrun`` does not do. It ends with the exit code of the run (75: saved, start me again), not with 1.
A SIGTERM or SIGUSR1 to it asks the ranks to save and stop, and it waits for them, where torchrun kills them after 30 s.
And it looks for the file ``stop`` in the folder of the attempt, so that whoever starts a job need not signal processes on
other hosts or in containers; Slurm's own way of doing so also hits helpers that know nothing of the signal.

A torchrun without --signals-to-handle takes SIGTERM and SIGINT for itself; the file and SIGUSR1 work there too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser
from torch.distributed.run import parse_args as parse_torchrun_arguments
from torch.distributed.run import run as run_torchrun

from megatron_dppo.errors import EXIT_START_AGAIN
from megatron_dppo.launch.attempt import Attempt
from megatron_dppo.launch.exit_codes import exit_code_of

_LOOK_EVERY_S = 0.5
_REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Agent:
    """Runs the ranks of this host and hands requests to stop on to them."""

    def __init__(self, attempt: Attempt) -> None:
        """``attempt``: whose ``stop`` file is looked for."""
        self._attempt = attempt
        self._was_asked = threading.Event()
        self._has_ended = threading.Event()

    def run(self, torchrun_arguments: list[str]) -> int:
        """Returns the exit code of this host's part of the run."""
        os.environ["MEGATRON_DPPO_AGENT"] = str(os.getpid())
        for number in _REQUESTS:
            signal.signal(number, lambda *_: self._ask_ranks())
        threading.Thread(target=self._look, name="stop-file", daemon=True).start()
        try:
            with tempfile.TemporaryDirectory(prefix="torchelastic_") as notes:  # its own such folder it leaves behind
                options = [*_leaving_signals(), "--log-dir", notes]
                run_torchrun(parse_torchrun_arguments([*options, *torchrun_arguments]))
        except ChildFailedError as failed:
            print(failed, file=sys.stderr, flush=True)
            return exit_code_of(self._told(failure.exitcode) for failure in failed.failures.values())
        finally:
            self._has_ended.set()
        return 0

    def _told(self, code: int) -> int:
        """A rank that was ended by our own request had not begun: nothing is lost."""
        asked = self._was_asked.is_set() and code in (-signal.SIGUSR1, -signal.SIGTERM)
        return EXIT_START_AGAIN if asked else code

    def _look(self) -> None:
        while not self._has_ended.wait(_LOOK_EVERY_S):
            if self._attempt.stop_file.exists() or self._was_asked.is_set():
                self._ask_ranks()

    def _ask_ranks(self) -> None:
        """Again and again, as a rank may have started since; a rank that knows already does not mind."""
        self._was_asked.set()
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if "megatron_dppo.launch.rank" in process.cmdline():
                    os.kill(process.pid, signal.SIGUSR1)


def _leaving_signals() -> list[str]:
    """Options by which torchrun leaves signals to us; none where it has no such option."""
    option = "--signals-to-handle"
    return [option, "SIGQUIT"] if option in get_args_parser().format_help() else []


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dppo.launch.agent",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, required=True, help="trainer nodes in all")
    parser.add_argument("--processes", type=int, required=True, help="trainer processes of each")
    parser.add_argument("--node-rank", type=int, help="which node this is")
    parser.add_argument("--node-rank-variable", metavar="NAME", help="environment variable that says so")
    parser.add_argument("--head", required=True, help="address of the first node")
    parser.add_argument("--port", required=True, type=int, help="free port there")
    parser.add_argument("--attempt", required=True, type=Path, help="folder of this start of the job")
    parser.add_argument(
        "--cores", metavar="A,B,...", help="that its processes may use, if nodes share a host; default: all"
    )
    parser.add_argument("arguments", nargs="*", help="of megatron-dppo train, after --")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse_arguments(arguments)
    node_rank = options.node_rank
    if node_rank is None:
        node_rank = int(os.environ[options.node_rank_variable])
    if options.cores:
        os.sched_setaffinity(0, map(int, options.cores.split(",")))
    attempt = Attempt(options.attempt)
    meeting = ["--master-addr", options.head, "--master-port", str(options.port)]
    nodes = ["--nnodes", str(options.nodes), "--node-rank", str(node_rank), "--nproc-per-node", str(options.processes)]
    code = Agent(attempt).run([*nodes, *meeting, "-m", "megatron_dppo.launch.rank", *options.arguments])
    attempt.write_exit_code(node_rank, code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
