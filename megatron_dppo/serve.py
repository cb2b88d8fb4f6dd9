"""Serve a run's policy on this host: ``megatron-dppo serve --config examples/conf/NAME.yaml key.sub=value ...``.

Starts one SGLang server for every ``rollout.sglang.tensor_model_parallel_size`` GPUs of the host, registers those that are
ready in ``rollout.sglang.registry``, where the trainer finds them, and starts again those that end. Until the trainer has
sent weights they serve the folder ``model.path``. Ends, with all its servers, on SIGTERM or Ctrl-C. Exit code 2: the input
cannot work; 3: servers keep failing to start; one message says why.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading

from megatron_dppo.errors import BAD_INPUT, EXIT_BAD_INPUT, EXIT_STOPPED, RolloutError


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-dppo serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the run's YAML file")
    parser.add_argument("--registry", help="folder to register in; default: rollout.sglang.registry")
    parser.add_argument(
        "--servers", type=int, help="how many to start; default: as many as the GPUs of this host allow"
    )
    parser.add_argument("--host", help="address to listen on; default: the one that other hosts reach this one by")
    parser.add_argument(
        "--nnodes", type=int, default=1, help="hosts that share one server; then each runs this command"
    )
    parser.add_argument("--node-rank", type=int, default=0, help="which of them this is; 0 is the one that is asked")
    parser.add_argument("--head", metavar="HOST:PORT", help="where they meet: an address of node 0, and a free port")
    parser.add_argument("--directory", help="where to run: what relative paths in the configuration are relative to")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input is closed")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides")
    return parser.parse_intermixed_args(arguments)


def serve(options: argparse.Namespace, stop: threading.Event) -> None:
    """Run servers until ``stop`` is set."""
    if options.directory:
        os.chdir(options.directory)
    from megatron_dppo.rollout.sglang.servers.nodes import Nodes  # help needs no torch
    from megatron_dppo.training.config.load import load_config

    config = load_config(options.config, options.overrides)
    from megatron_dppo.training.serving import serve_policy  # its HTTP client is an extra

    nodes = Nodes(options.nnodes, options.node_rank, options.head)
    serve_policy(config, stop, registry=options.registry, servers=options.servers, address=options.host, nodes=nodes)


def _set_at_eof(stop: threading.Event) -> None:
    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        stop.set()

    threading.Thread(target=wait, name="until-eof", daemon=True).start()


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    options = parse_arguments(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.until_eof:
        _set_at_eof(stop)
    try:
        serve(options, stop)
    except (*BAD_INPUT, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RolloutError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
