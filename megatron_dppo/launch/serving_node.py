"""A serving node that shares a server with others, or ends with the run: ``megatron-dppo serve`` with its place in the job.

A scheduler starts the same command on all nodes and tells each its number in an environment variable; from that and the list
of addresses follow the arguments of ``serve``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

from megatron_dppo.launch.attempt import Attempt
from megatron_dppo.serve import main as serve

_LOOK_EVERY_S = 2.0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dppo.launch.serving_node",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--node-variable", metavar="NAME", required=True, help="has this serving node's number")
    parser.add_argument("--nodes-per-server", type=int, default=1, help="nodes that share one server")
    parser.add_argument("--addresses", default="", metavar="A,B,...", help="of all serving nodes, by their numbers")
    parser.add_argument("--port", type=int, default=0, help="where the nodes of a server meet, on its first node")
    parser.add_argument("--end-with", metavar="FOLDER", type=Path, help="end when the run of this attempt is done")
    parser.add_argument("arguments", nargs="*", help="of megatron-dppo serve, after --")
    return parser.parse_args(arguments)


def place_arguments(node: int, nodes_per_server: int, addresses: list[str], port: int) -> list[str]:
    """Arguments of ``serve`` for the serving node of this number."""
    if nodes_per_server == 1:
        return []
    rank = node % nodes_per_server
    head = f"{addresses[node - rank]}:{port}"
    return ["--nnodes", str(nodes_per_server), "--node-rank", str(rank), "--head", head]


def _end_with(attempt: Attempt) -> None:
    started = time.time()

    def wait() -> None:
        while not attempt.was_done_after(started):
            time.sleep(_LOOK_EVERY_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="end-with", daemon=True).start()


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse_arguments(arguments)
    if options.end_with:
        _end_with(Attempt(options.end_with))
    node = int(os.environ[options.node_variable])
    place = place_arguments(node, options.nodes_per_server, options.addresses.split(","), options.port)
    return serve([*options.arguments, *place])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
