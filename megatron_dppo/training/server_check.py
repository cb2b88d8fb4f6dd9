"""A run's servers, started or found as the run would, and asked all that can be asked before the policy is loaded."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

from megatron_dppo.errors import ConfigError
from megatron_dppo.rollout.sglang.config import START_ROUTER
from megatron_dppo.rollout.sglang.preflight import Preflight, Report
from megatron_dppo.rollout.sglang.router import Router
from megatron_dppo.rollout.sglang.servers.choose import choose_source
from megatron_dppo.rollout.sglang.servers.pool import ServerPool
from megatron_dppo.rollout.sglang.servers.router_process import RouterProcess
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.training.config.load import save_config
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.served_policy import serve_command, served_policy


def check_servers(config: Config) -> list[Report]:
    """What there is to say of every server, and of the way to them.

    Raises:
        ConfigError: the run has no servers.
        RolloutError: they are not there in time.
    """
    if config.rollout.engine != "sglang":
        raise ConfigError(f"rollout.engine={config.rollout.engine} has no servers to connect to")
    sglang, policy = config.rollout.sglang, served_policy(config)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    root = Path(config.run.root)
    root.mkdir(parents=True, exist_ok=True)  # hosts share it
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".server_check_", dir=root)))
        save_config(config, logs / "config.yaml")
        transport = stack.enter_context(closing(Transport(sglang.keys)))
        source = choose_source(sglang, policy, transport, logs, serve_command(logs / "config.yaml"))
        pool = stack.enter_context(closing(ServerPool(sglang, transport, source)))
        pool.prepare()
        urls = sorted(pool.fit(0).urls)
        software = {url: source.software_of(url) for url in urls}
        preflight = Preflight(sglang, policy, transport, longest)
        reports = preflight.examine(urls, software)
        if sglang.router is not None and not any(report.is_fatal for report in reports):
            address = sglang.router
            if address == START_ROUTER:
                address = stack.enter_context(closing(RouterProcess(sglang, transport, logs))).url
            reports.append(preflight.examine_router(Router(address, transport, sglang), urls))
        return reports
