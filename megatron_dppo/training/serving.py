"""A run's policy, served on this host for a trainer elsewhere."""

from __future__ import annotations

import dataclasses
import socket
import threading
from pathlib import Path

import torch

from megatron_dppo.errors import ConfigError
from megatron_dppo.rollout.sglang.servers.local import LocalServers
from megatron_dppo.rollout.sglang.servers.nodes import Nodes
from megatron_dppo.rollout.sglang.servers.registry import Registry
from megatron_dppo.rollout.sglang.servers.serving import ServingHost, address_of_this_host
from megatron_dppo.rollout.sglang.servers.watchdog import Watchdog
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.served_policy import served_policy


def serve_policy(
    config: Config,
    stop: threading.Event,
    *,
    registry: str | None = None,
    servers: int | None = None,
    address: str | None = None,
    nodes: Nodes = Nodes(),  # noqa: B008  it cannot be changed
) -> None:
    """Run servers, registered while they are ready, until ``stop`` is set.

    Args:
        config: of the run.
        stop: ends the servers.
        registry: folder to register in; None: ``rollout.sglang.registry``.
        servers: how many; None: as many as the GPUs of this host allow, one where there are none.
        address: to listen on; None: the one that other hosts reach this one by.
        nodes: that share one server with this host.

    Raises:
        ConfigError: the configuration cannot work on this host.
        RolloutError: servers keep failing to start.
    """
    sglang = config.rollout.sglang
    sglang.check()
    folder = _registry_folder(registry or sglang.registry)
    nodes.check(sglang.tensor_model_parallel_size)
    count = servers or _servers_that_fit(sglang.tensor_model_parallel_size, nodes.count)
    here = dataclasses.replace(
        sglang,
        host=address or address_of_this_host(),
        base_gpu_id=sglang.base_gpu_id or 0,
        num_servers=count,
    )
    policy = served_policy(config)
    if not (policy.model_folder / "config.json").is_file():
        raise ConfigError(f"model.path: there is no {policy.model_folder / 'config.json'} on this host")
    transport = Transport(sglang.keys)
    try:
        logs = folder / "logs" / socket.gethostname()
        local = LocalServers.of(policy, count, here, transport, logs, nodes)
        watchdog = Watchdog(transport, sglang.hang_timeout_s)
        ServingHost(local, Registry(folder) if nodes.rank == 0 else None, watchdog).serve(stop)
    finally:
        transport.close()


def _registry_folder(path: str | None) -> Path:
    if path is None:
        raise ConfigError("name a folder that the trainer's hosts share: rollout.sglang.registry, or --registry")
    if Path(path).is_file():
        raise ConfigError(f"rollout.sglang.registry = {path} is a file with addresses: servers register in a folder")
    return Path(path)


def _servers_that_fit(gpus_of_one: int, nodes: int) -> int:
    """On this host; one where there are no GPUs. Raises ConfigError if not even this host's share of one fits."""
    if nodes > 1 or not torch.cuda.is_available():
        return 1
    gpus = torch.cuda.device_count()
    if gpus < gpus_of_one:
        raise ConfigError(
            f"rollout.sglang.tensor_model_parallel_size = {gpus_of_one}, but this host has {gpus} GPUs: lower it, or share a"
            " server between hosts with --nnodes"
        )
    return gpus // gpus_of_one
