"""Servers that a command starts on other hosts: one ``megatron_dppo.serve`` a host, whose servers register themselves."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_dppo.rollout.sglang.servers.guarded_process import GuardedProcess
from megatron_dppo.rollout.sglang.servers.registry import RegisteredServers
from megatron_dppo.rollout.sglang.servers.software import Software
from megatron_dppo.rollout.sglang.servers.source import Found

# Whoever serves gives its servers the usual grace: killed before that is over, it could not end them.
_EXTRA_GRACE_S = 7.0


class LaunchedServers:
    """A ``ServerSource``: a process here for every host, which ends its servers there when it ends.

    The servers of a host end by themselves when their standard input is closed (``serve --until-eof``), so they end with this
    process even where the command is one that leaves its remote end behind.
    """

    def __init__(
        self, template: str, hosts: Sequence[str], serve: Sequence[str], registered: RegisteredServers, log_folder: Path
    ) -> None:
        """See ``SGLangConfig.launch``.

        Args:
            template: shell command with ``{serve}``, and ``{host}`` if there are ``hosts``.
            hosts: the command is run once for each; none: once.
            serve: the command that serves on a host, without its shell quoting.
            registered: where its servers register.
            log_folder: of what the commands say.
        """
        self._commands = {
            host: _filled(template, host=host, serve=shlex.join(serve)) for host in (hosts or ("servers",))
        }
        self._registered = registered
        self._log_folder = log_folder
        self._processes: dict[str, GuardedProcess] = {}

    @property
    def expected(self) -> int:
        """Over all hosts."""
        return self._registered.expected

    def start(self) -> None:
        """Those that do not run, or have ended, are started."""
        for host, command in self._commands.items():
            process = self._processes.get(host)
            if process is None or not process.is_running():
                log = self._log_folder / f"launch_{re.sub(r'[^A-Za-z0-9.-]', '_', host)}.log"
                self._processes[host] = GuardedProcess(["sh", "-c", command], log, os.environ, _EXTRA_GRACE_S)

    def find(self) -> Found:
        """See ``ServerSource.find``."""
        found = self._registered.find()
        ended = tuple(
            f"what was to start the servers of {host} has ended. {process.log_tail()}"
            for host, process in self._processes.items()
            if not process.is_running()
        )
        return Found(found.urls, found.awaited, ended)

    def end(self, url: str) -> None:
        """One alone cannot be ended: they share a process here."""

    def software_of(self, url: str) -> Software | None:
        """As it has registered."""
        return self._registered.software_of(url)

    def close(self) -> None:
        """End them, and thereby the servers that they started."""
        for process in self._processes.values():
            process.ask_to_end()
        for process in self._processes.values():
            process.end()
        self._processes.clear()


def _filled(template: str, **values: str) -> str:
    """Other braces stay as they are: shells have uses for them."""
    return re.sub(r"\{(host|serve)\}", lambda match: values[match[1]], template)
