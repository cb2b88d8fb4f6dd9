"""The servers of an engine: those that it starts, or those that it was told of; and which of them can be updated now.

Before the first update all of them have to be there. Later a server that does not answer is left out, and comes back with the
first update that finds it again: it has no weights of ours then, and gets them, verified, like all others.
"""

from __future__ import annotations

import concurrent.futures
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_dppo.errors import RolloutError
from megatron_dppo.rollout.sglang.answers import reading
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.server import SGLangServer
from megatron_dppo.rollout.sglang.transport import Transport

_ASK_AGAIN_S = 1.0
_SAY_SO_EVERY_S = 30.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """The servers that can be updated.

    Attributes:
        urls: their addresses, in the order of the configuration.
        newcomers: those among them that do not serve the weights of the last update: they are new, or were started again.
    """

    urls: tuple[str, ...]
    newcomers: frozenset[str]


class ServerPool:
    """Used by the one rank that owns the servers."""

    def __init__(self, config: SGLangConfig, transport: Transport, make_server: Callable[[int], SGLangServer]) -> None:
        """``make_server`` is called with the index of each server to start: none if ``config.urls`` names servers."""
        self._config = config
        self._transport = transport
        self._started = [] if config.urls else [make_server(index) for index in range(config.num_servers)]

    @property
    def urls(self) -> list[str]:
        """Of all servers, whether they answer or not."""
        return list(self._config.urls) or [server.url for server in self._started]

    def prepare(self) -> None:
        """Start the servers, or wait for those that others start. Raises RolloutError if one is not ready in time."""
        self._start(self._started)
        if self._config.urls:
            self._wait_for_found_servers()

    def fit(self, version: int) -> Fit:
        """Find out who can be updated, after ``version`` was the last update. Started servers that ended start again.

        Raises:
            RolloutError: they are fewer than ``config.min_servers``; those that do not answer are named.
        """
        self._start([server for server in self._started if not server.is_running()])
        labels, silent = self._labels()
        if len(labels) < self._config.min_servers:
            raise RolloutError(
                f"{len(labels)} of {len(self.urls)} SGLang servers answer, fewer than min_servers = "
                f"{self._config.min_servers}: {'; '.join(silent.values())}"
            )
        for url, reason in silent.items():
            _log.warning("%s is left out of this update: %s", url, reason)
        return Fit(tuple(labels), frozenset(url for url, label in labels.items() if label != str(version)))

    def close(self) -> None:
        """End the servers that were started. Safe to call twice."""
        for server in self._started:
            server.close()
        self._started = []

    def _start(self, servers: list[SGLangServer]) -> None:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready(self._transport)

    def _wait_for_found_servers(self) -> None:
        deadline = time.monotonic() + self._config.startup_timeout_s
        say_so = time.monotonic() + _SAY_SO_EVERY_S
        while silent := self._labels()[1]:
            now = time.monotonic()
            if now > deadline:
                limit = self._config.startup_timeout_s
                raise RolloutError(
                    f"{len(silent)} of {len(self.urls)} SGLang servers were not ready after startup_timeout_s = {limit:g} s: "
                    + "; ".join(silent.values())
                )
            if now > say_so:
                say_so = now + _SAY_SO_EVERY_S
                _log.warning("waiting for %s", ", ".join(silent))
            time.sleep(_ASK_AGAIN_S)

    def _labels(self) -> tuple[dict[str, str], dict[str, str]]:
        """(url -> the version that a server says it serves, url -> why a server does not say)."""
        asked = {
            url: self._transport.submit(
                self._transport.request(url, "/model_info", None, self._config.control_timeout_s)
            )
            for url in self.urls
        }
        concurrent.futures.wait(asked.values())
        labels, silent = {}, {}
        for url, answer in asked.items():
            try:
                info = answer.result()
                with reading(f"{url}/model_info"):
                    labels[url] = str(info["weight_version"])
            except RolloutError as error:
                silent[url] = str(error)
        return labels, silent
