"""A sglang-router of this process: started, started again if it ended, and ended with this process however that ends."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

from megatron_dppo.errors import RolloutError, TransientServerError
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.servers.guarded_process import GuardedProcess
from megatron_dppo.rollout.sglang.servers.server import free_port
from megatron_dppo.rollout.sglang.servers.serving import address_of_this_host
from megatron_dppo.rollout.sglang.transport import Transport

_KEY = "MEGATRON_DPPO_ROUTER_KEY"
# Its key by way of its environment, which is nobody else's to read: arguments are there for all to see. What its own command
# does besides is to import all of SGLang.
_LAUNCH = f"""
import argparse, os, sys
from sglang_router.router import Router
from sglang_router.router_args import RouterArgs
key = os.environ.pop({_KEY!r}, None)
parser = argparse.ArgumentParser()
RouterArgs.add_cli_args(parser, use_router_prefix=False)
options = parser.parse_args(sys.argv[1:] + (["--api-key", key] if key else []))
Router.from_args(RouterArgs.from_cli_args(options, use_router_prefix=False)).start()
"""
_ASK_AGAIN_S = 0.1


class RouterProcess:
    """Started when it is made. It knows of no server yet."""

    def __init__(self, config: SGLangConfig, transport: Transport, log_folder: Path) -> None:
        """Its log is in ``log_folder``. Raises RolloutError, with the log's end, if it does not answer."""
        self._config = config
        self._transport = transport
        self._log_path = log_folder / "sglang_router.log"
        # Where servers are elsewhere, ranks that ask for responses are, too.
        self._host = config.host if config.starts_servers_here else address_of_this_host()
        self._port = free_port()
        self.url = f"http://{self._host}:{self._port}"
        self._process = self._started()

    def start_again(self) -> None:
        """At the same address, if it has ended. Raises RolloutError if it does not answer."""
        if not self._process.is_running():
            self._process.end()
            self._process = self._started()

    def close(self) -> None:
        """End it. Safe to call twice."""
        self._process.end()

    def _started(self) -> GuardedProcess:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if self._config.keys.api is not None:
            environment[_KEY] = self._config.keys.api
        process = GuardedProcess(self._command(), self._log_path, environment)
        deadline = time.monotonic() + self._config.startup_timeout_s
        while process.is_running() and time.monotonic() < deadline:
            try:
                self._transport.call(self.url, "/liveness", None, self._config.control_timeout_s)
                return process
            except TransientServerError:
                time.sleep(_ASK_AGAIN_S)
        process.end()
        raise RolloutError(
            f"the router does not run: rollout.sglang.router=start needs sglang-router where SGLang is ({self._python}: pip"
            f" install sglang-router). Or leave rollout.sglang.router out. {process.log_tail()}"
        )

    @property
    def _python(self) -> str:
        return self._config.python or sys.executable

    def _command(self) -> list[str]:
        options = {
            "--host": self._host,
            "--port": str(self._port),
            "--policy": "cache_aware",
            "--request-timeout-secs": str(math.ceil(self._config.generate_timeout_s)),
            "--prometheus-host": "127.0.0.1",
            "--prometheus-port": str(free_port()),
            "--log-level": "warn",
        }
        # Who is asked no more is decided by the run. It would ask nobody for a minute once ten requests had failed.
        words = [word for option in options.items() for word in option]
        return [self._python, "-c", _LAUNCH, *words, "--disable-circuit-breaker"]
