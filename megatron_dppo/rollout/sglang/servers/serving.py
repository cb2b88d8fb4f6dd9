"""A serving host: its servers run, are registered as long as they do, and are started again when they end or hang."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from urllib.parse import urlsplit

from megatron_dppo.errors import RolloutError
from megatron_dppo.rollout.sglang.servers.local import LocalServers
from megatron_dppo.rollout.sglang.servers.registry import Registration, Registry
from megatron_dppo.rollout.sglang.servers.watchdog import Watchdog

_LOOK_EVERY_S = 0.5
# A server that never becomes ready will not do so next time either; one that served for long and ends is another matter.
_FAILED_STARTS = 3

_log = logging.getLogger(__name__)


class ServingHost:
    """Keeps servers running and registered until it is told to stop."""

    def __init__(self, servers: LocalServers, registry: Registry | None, watchdog: Watchdog) -> None:
        """``servers``: not started yet; they end with ``serve``. ``registry``: None where others speak for them.

        ``watchdog``: says which of them are to be ended, to be started again.
        """
        self._servers = servers
        self._watchdog = watchdog
        self._registry = registry
        self._host = socket.gethostname()
        self._registered: dict[str, str] = {}  # name -> url
        self._failures = 0  # in a row

    def serve(self, stop: threading.Event) -> None:
        """Return when ``stop`` is set. Raises RolloutError if servers keep failing to start."""
        try:
            began = time.monotonic()
            while not stop.is_set():
                self._servers.start()
                found = self._servers.find()
                self._end_hung(found.urls)
                self._register(found.urls, time.monotonic() - began)
                self._count(found.failures)
                stop.wait(_LOOK_EVERY_S)
        finally:
            for name in self._registered:
                self._leave(name)
            self._watchdog.close()
            self._servers.close()

    def _end_hung(self, urls: tuple[str, ...]) -> None:
        for url in self._watchdog.hung([url for url in self._servers.running(urls) if url is not None]):
            _log.warning("%s hangs, and is started again: %s", self._name(url), self._watchdog.limit)
            self._servers.end(url)

    def _register(self, urls: tuple[str, ...], seconds: float) -> None:
        running = {self._name(url): url for url in self._servers.running(urls) if url is not None}
        for name in self._registered.keys() - running.keys():
            _log.warning("%s has ended: %s", name, self._registered[name])
            self._leave(name)
        for name, url in running.items():
            if self._registered.get(name) != url:
                self._enter(name, url)
                _log.warning("%s is ready after %.0f s: %s", name, seconds, url)
                self._failures = 0
        self._registered = running

    def _enter(self, name: str, url: str) -> None:
        if self._registry is not None:
            self._registry.enter(name, Registration(url, self._host, os.getpid(), self._servers.software_of(url)))

    def _leave(self, name: str) -> None:
        if self._registry is not None:
            self._registry.leave(name)

    def _name(self, url: str) -> str:
        """No other server of this host has it, not even one that another process has started."""
        return f"{self._host}-{urlsplit(url).port}"

    def _count(self, failures: tuple[str, ...]) -> None:
        for failure in failures:
            self._failures += 1
            _log.warning("%s", failure)
            if self._failures >= _FAILED_STARTS:
                raise RolloutError(f"{_FAILED_STARTS} starts in a row failed; the last: {failure}")


def address_of_this_host() -> str:
    """The address by which other hosts most likely reach this one; the loopback address if it has no other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a UDP socket only picks a route. The address is one that nobody has (RFC 5737).
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            _log.warning("this host has no route to others: servers listen on 127.0.0.1, where only it reaches them")
            return "127.0.0.1"
