"""Servers that this process starts on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_dppo.errors import RolloutError
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.servers.nodes import Nodes
from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy, prepare_served_folder
from megatron_dppo.rollout.sglang.servers.server import SGLangServer
from megatron_dppo.rollout.sglang.servers.software import Software
from megatron_dppo.rollout.sglang.servers.source import Found
from megatron_dppo.rollout.sglang.transport import Transport


class LocalServers:
    """A ``ServerSource``: server processes of this process, which end with it."""

    def __init__(self, servers: Sequence[SGLangServer], transport: Transport) -> None:
        """``servers``: not started yet. ``transport`` asks them whether they are ready."""
        self.servers = list(servers)
        self._transport = transport
        self._loading: set[SGLangServer] = set()
        self._ready: set[SGLangServer] = set()
        self._failures: dict[SGLangServer, str] = {}
        self._software: Software | None = None

    @classmethod
    def of(
        cls,
        policy: ServedPolicy,
        count: int,
        config: SGLangConfig,
        transport: Transport,
        log_folder: Path,
        nodes: Nodes = Nodes(),  # noqa: B008  it cannot be changed
    ) -> LocalServers:
        """``count`` servers of a policy, with their logs and the folder that they load in ``log_folder``.

        ``nodes``: that share each of them with this host.
        """
        served = prepare_served_folder(policy.model_folder, log_folder / "served_model")
        return cls(
            [
                SGLangServer(
                    config,
                    served,
                    policy.dtype,
                    log_folder,
                    index,
                    return_routed_experts=policy.return_routed_experts,
                    nodes=nodes,
                    fp32_head=policy.fp32_head,
                )
                for index in range(count)
            ],
            transport,
        )

    @property
    def expected(self) -> int:
        """All of them."""
        return len(self.servers)

    def start(self) -> None:
        """Those that have not run yet, have ended, or did not become ready, start."""
        for server in self.servers:
            if server in self._loading or (server in self._ready and server.is_running()):
                continue
            self._ready.discard(server)
            self._failures.pop(server, None)
            self._loading.add(server)
            server.start()

    def find(self) -> Found:
        """See ``ServerSource.find``."""
        for server in tuple(self._loading):
            self._look(server)
        return Found(
            urls=tuple(server.url for server in self.servers if server in self._ready),
            awaited=tuple(f"the server of {server.log_path}" for server in self.servers if server in self._loading),
            failures=tuple(self._failures.values()),
        )

    def running(self, urls: Sequence[str]) -> list[str | None]:
        """For every server its address, if that is one of ``urls`` and its process has not ended since."""
        return [server.url if server.url in urls and server.is_running() else None for server in self.servers]

    def _look(self, server: SGLangServer) -> None:
        try:
            if not server.is_ready(self._transport):
                return
            self._ready.add(server)
        except RolloutError as error:
            self._failures[server] = str(error)
        self._loading.discard(server)

    def end(self, url: str) -> None:
        """See ``ServerSource.end``."""
        for server in self.servers:
            if server.url == url:
                server.close()

    def software_of(self, url: str) -> Software | None:
        """They all have the same interpreter."""
        if self._software is None:
            self._software = self.servers[0].software()
        return self._software

    def close(self) -> None:
        """End them."""
        for server in self.servers:
            server.ask_to_end()
        for server in self.servers:
            server.close()
        self._loading.clear()
        self._ready.clear()
