"""Which servers an update may reach: those that answer, and whose settings and layout fit the policy."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_dppo.errors import RolloutError
from megatron_dppo.rollout.sglang.answers import reading
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.server_facts import ServerFacts
from megatron_dppo.rollout.sglang.server_settings import examine_settings
from megatron_dppo.rollout.sglang.servers.pool import Fit, ServerPool
from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy
from megatron_dppo.rollout.sglang.transport import Transport

_log = logging.getLogger(__name__)


class Admission:
    """Asked before every update, by the rank that owns the servers."""

    def __init__(self, config: SGLangConfig, served: ServedPolicy, pool: ServerPool, transport: Transport) -> None:
        self._config = config
        self._served = served
        self._pool = pool
        self._transport = transport

    def admitted(self, weight_version: int, known: Sequence[ServerFacts] | None) -> list[ServerFacts] | None:
        """The servers of the next update; None: they are those that are known.

        Args:
            weight_version: that servers have, where they were in the last update.
            known: the servers of the last update; None before the first.

        Raises:
            RolloutError: too few are of use; or, at the start, one is not.
        """
        fit = self._pool.fit(weight_version)
        admitted = self._of_use(fit, known)
        urls = {server.url for server in admitted}
        if known is not None and urls == {server.url for server in known} and not urls & fit.newcomers:
            return None
        return admitted

    def _of_use(self, fit: Fit, known: Sequence[ServerFacts] | None) -> list[ServerFacts]:
        """At the start all have to be; later one that is not is left out like one that does not answer."""
        old = {server.url: server for server in known or () if server.url not in fit.newcomers}
        admitted, refused = [], []
        for url in fit.urls:
            try:
                admitted.append(old[url] if url in old else self._facts_of(url))
            except RolloutError as error:
                if known is None:
                    raise
                refused.append(str(error))
                _log.warning("left out of this update: %s", error)
        fewest = self._config.fewest_servers
        if len(admitted) < fewest:
            raise RolloutError(
                f"{len(admitted)} SGLang servers can be used, fewer than min_servers = {fewest}: {'; '.join(refused)}"
            )
        return admitted

    def _facts_of(self, url: str) -> ServerFacts:
        info = self._transport.call(url, "/server_info", None, self._config.control_timeout_s)
        with reading(f"{url}/server_info"):
            findings = examine_settings(info, self._served)
        for finding in findings:
            if finding.is_fatal:
                raise RolloutError(f"{url} cannot be used: {finding}")
            _log.warning("%s: %s", url, finding)
        return ServerFacts.of(url, info)
