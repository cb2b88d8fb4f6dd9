"""A byte to every rank of every server, by the way that weights take, before there is anything to send."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_dppo.errors import RefusedRequestError
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.server_facts import ServerFacts
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.sglang.update_group import address_seen_from, join_update_group, open_store

_NOBODYS_TENSOR = "megatron_dppo.preflight"
_TRY_AGAIN_S = 0.2


class ProbeByte:
    """It goes to a tensor that no model has."""

    def __init__(
        self, servers: Sequence[ServerFacts], config: SGLangConfig, transport: Transport, backend: str
    ) -> None:
        self._servers = servers
        self._config = config
        self._transport = transport
        self._backend = backend
        self._deadline = time.monotonic() + config.control_timeout_s
        self._name = f"megatron_dppo_preflight_{uuid.uuid4().hex}"

    def send(self) -> None:
        """Raises RolloutError or RuntimeError if it does not arrive."""
        timeout = timedelta(seconds=self._config.control_timeout_s)
        address = self._config.master_address or address_seen_from(self._servers[0].url)
        store = open_store(address, timeout)
        size = 1 + sum(server.num_ranks for server in self._servers)
        asked, offset = [], 1
        for server in self._servers:
            body = {
                "master_address": address,
                "master_port": store.port,
                "rank_offset": offset,
                "world_size": size,
                "group_name": self._name,
                "backend": self._backend,
            }
            asked.append(self._post(server.url, "/init_weights_update_group", body))
            offset += server.num_ranks
        group = join_update_group(self._name, store, size, self._backend, timeout)
        try:
            for answer in asked:
                answer.result()
            self._broadcast(group)
        finally:
            left = [
                self._post(s.url, "/destroy_weights_update_group", {"group_name": self._name}) for s in self._servers
            ]
            for answer in left:
                answer.exception()
            dist.destroy_process_group(group)

    def _broadcast(self, group: dist.ProcessGroup) -> None:
        for server in self._servers:
            self._begin(server.url)
        body = {
            "names": [_NOBODYS_TENSOR],
            "dtypes": ["uint8"],
            "shapes": [[1]],
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        asked = [self._post(server.url, "/update_weights_from_distributed", body) for server in self._servers]
        byte = torch.ones(1, dtype=torch.uint8, device="cuda" if self._backend == "nccl" else "cpu")
        dist.broadcast(byte, group_src=0, group=group)
        for answer in asked:
            answer.result()
        for server in self._servers:
            self._post(server.url, "/end_weight_update", {}).result()

    def _begin(self, url: str) -> None:
        """Another host of the trainer's may be at it: one after the other."""
        while True:
            try:
                self._post(url, "/begin_weight_update", {}).result()
                return
            except RefusedRequestError:
                if time.monotonic() > self._deadline:
                    raise
                time.sleep(_TRY_AGAIN_S)

    def _post(self, url: str, path: str, body: dict[str, Any]) -> Any:
        left = max(0.1, self._deadline - time.monotonic())
        return self._transport.submit(self._transport.request(url, path, body, left))
