"""Which source of servers a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_dppo.errors import ConfigError
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.servers.launched import LaunchedServers
from megatron_dppo.rollout.sglang.servers.local import LocalServers
from megatron_dppo.rollout.sglang.servers.registry import RegisteredServers, Registry
from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy
from megatron_dppo.rollout.sglang.servers.source import NamedServers, ServerSource
from megatron_dppo.rollout.sglang.transport import Transport

REGISTRY_IN_LOGS = "registry"  # of launched servers, unless another is named


def choose_source(
    config: SGLangConfig,
    policy: ServedPolicy,
    transport: Transport,
    log_folder: Path,
    serve_command: Sequence[str] = (),
) -> ServerSource:
    """The one that ``config`` names; nothing is started.

    Args:
        config: ``urls``, ``launch``, ``registry`` or none of them.
        policy: that servers started here serve.
        transport: asks servers started here whether they are ready.
        log_folder: of servers started here, and of launching commands.
        serve_command: serves the policy on another host, but for its registry: ``--registry`` is appended.
    """
    if config.urls:
        return NamedServers(config.urls)
    if config.launch is not None:
        if not serve_command:
            raise ConfigError("SGLangConfig.launch needs a command that serves: SGLangEngine(serve_command=...)")
        registry = Path(config.registry or log_folder / REGISTRY_IN_LOGS).absolute()
        Registry(registry).clear()  # whoever is in it ended with an earlier run
        serve = [*serve_command, "--registry", str(registry)]
        registered = RegisteredServers(registry, config.num_servers)
        return LaunchedServers(config.launch, config.launch_hosts, serve, registered, log_folder)
    if config.registry is not None:
        return RegisteredServers(Path(config.registry), config.num_servers)
    return LocalServers.of(policy, config.num_servers, config, transport, log_folder)
