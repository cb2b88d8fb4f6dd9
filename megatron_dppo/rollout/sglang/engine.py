"""The SGLang rollout engine: servers of their own, reached over HTTP, updated by broadcast or on shared devices.

The trainer's global rank 0 owns the servers and sends the weights; the leader of each model replica, its first rank, asks for
that replica's responses. Whatever goes wrong in a weight update is raised on all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_dppo.distributed.collectives import on_one_rank
from megatron_dppo.errors import ConfigError, RolloutError, WeightSyncError
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.models.hf.dtype_names import dtype_name
from megatron_dppo.rollout.engine import ServerLoad, WeightSource, check_request
from megatron_dppo.rollout.sample import FailedSample, Prompt, Sample, SamplingParams
from megatron_dppo.rollout.sglang.admission import Admission
from megatron_dppo.rollout.sglang.client import RolloutClient
from megatron_dppo.rollout.sglang.config import ROUTER_DROPS_EXPERTS, START_ROUTER, SGLangConfig
from megatron_dppo.rollout.sglang.parameter_layout import ModelShape
from megatron_dppo.rollout.sglang.routed_experts import RoutingShape
from megatron_dppo.rollout.sglang.router import Router
from megatron_dppo.rollout.sglang.server_facts import ServerFacts
from megatron_dppo.rollout.sglang.server_memory import ServerMemory
from megatron_dppo.rollout.sglang.servers.choose import choose_source
from megatron_dppo.rollout.sglang.servers.pool import ServerPool
from megatron_dppo.rollout.sglang.servers.router_process import RouterProcess
from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.sglang.weight_sync import WeightSync

T = TypeVar("T")

_log = logging.getLogger(__name__)


class SGLangEngine:
    """A ``RolloutEngine`` (see rollout/engine.py) backed by one or many SGLang servers.

    Constructed by every rank of the trainer at the same time; works without torch.distributed in a single process.
    Nothing is generated before the first ``update_weights``: until then a server holds whatever checkpoint it was
    started with. A weight update that fails leaves the engine unusable and the servers paused.
    """

    def __init__(
        self,
        config: SGLangConfig,
        model_folder: str | Path,
        *,
        vocab_size: int,
        dtype: torch.dtype,
        log_folder: str | Path,
        replica_group: dist.ProcessGroup | None = None,
        return_routed_experts: bool = False,
        serve_command: Sequence[str] = (),
        stop: Callable[[], str | None] = lambda: None,
        stop_generating: Callable[[], str | None] = lambda: None,
        fp32_head: bool = False,
    ) -> None:
        """Start (or find) the servers. Raises ValueError for a bad option, RolloutError if a server does not come up.

        Args:
            config: how to run and reach the servers.
            model_folder: Hugging Face checkpoint that started servers load.
            vocab_size: true vocabulary size; prompts with ids beyond it are refused.
            dtype: the trainer's dtype, used unless ``config.dtype`` names another.
            log_folder: where servers write their logs, normally the run folder.
            replica_group: the ranks that share one copy of the policy and its prompts; None: this rank alone.
            return_routed_experts: start servers that can return expert choices, for
                ``SamplingParams.return_routed_experts``. ValueError if the policy is dense.
            stop: asked while servers are waited for: why the run is to stop, or None.
            stop_generating: the same, asked while responses are waited for, every second from the event loop's thread.
            serve_command: what ``config.launch`` runs on other hosts: ``python -m megatron_dppo.serve`` with all it needs.
            fp32_head: the trainer leaves its logits in fp32 (in float32 it does in any case). Started servers do too; found
                ones that differ are refused.
        """
        config.check()
        if config.router is not None and return_routed_experts:
            raise ConfigError(ROUTER_DROPS_EXPERTS)
        self._hf_config = load_hf_config(model_folder)
        self._routing = RoutingShape.of(self._hf_config) if return_routed_experts else None
        self._served = ServedPolicy.of_trainer(
            model_folder,
            dtype_name(dtype),
            served_in=config.dtype,
            return_routed_experts=return_routed_experts,
            fp32_head=fp32_head,
        )
        self._config = config
        self._vocab_size = vocab_size
        self._dtype = getattr(torch, config.dtype) if config.dtype else dtype
        self._weight_version = 0
        self._failed = False
        self._unusable_because: str | None = "no weights were sent yet: call update_weights before generating"
        self._is_owner = not dist.is_initialized() or dist.get_rank() == 0
        self._is_leader = replica_group is None or dist.get_rank(replica_group) == 0
        self._transport = Transport(config.keys)
        self._router_process: RouterProcess | None = None  # on the owner, if this engine starts one
        self._pool: ServerPool | None = None  # on the owner
        self._admission: Admission | None = None  # likewise
        self._memory: ServerMemory | None = None  # likewise, if the servers are colocated
        self._sync: WeightSync | None = None
        self._log_folder = Path(log_folder)
        self._serve_command = serve_command
        self._stop = stop
        try:
            self._on_owner(self._prepare_servers)
            self._router = self._find_router()
            self._client = RolloutClient(self._transport, config, self._routing, stop_generating, self._router)
        except BaseException:
            self.close()
            raise

    @property
    def weight_version(self) -> int:
        """The argument of the last completed ``update_weights``; 0 before the first."""
        return self._weight_version

    @property
    def max_topk_log_probs(self) -> int:
        """The largest K for which the servers return top-K log-probs: the whole vocabulary."""
        return self._vocab_size

    @property
    def ranks_generate_together(self) -> bool:
        """One rank of a replica asks its servers; nobody waits for it meanwhile."""
        return False

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample | FailedSample]:
        """See ``RolloutEngine.generate``. Raises StoppedWaitingError when ``stop_generating`` has a reason."""
        self._require_usable()
        check_request(prompts, sampling, vocab_size=self._vocab_size)
        if sampling.return_routed_experts and self._routing is None:
            raise ValueError(
                "SamplingParams.return_routed_experts needs SGLangEngine(return_routed_experts=True) and an MoE policy: "
                "the servers of this engine were not asked to keep expert choices"
            )
        return self._client.generate(prompts, sampling, self._weight_version) if self._is_leader else []

    def update_weights(self, weights: WeightSource, version: int) -> None:
        """See ``RolloutEngine.update_weights``.

        Servers that do not answer are left out, and taken back by the first update that finds them again; those that this
        engine started and that have ended are started again for that. If one is lost amid the update, the others get all
        weights anew.
        """
        if self._failed:
            self._require_usable()
        self._join_servers()
        self._unusable_because = f"the weight update to version {version} did not complete"
        while True:
            assert self._sync is not None
            try:
                self._sync.update(weights, version)
                break
            except WeightSyncError as error:
                if not self._on_owner(self._lost_servers):
                    self._failed = True
                    self._unusable_because = f"the weight update to version {version} failed: {error}"
                    raise
            self._join_servers(anew=True)
        self._on_owner(self._send_requests_on)
        self._client.set_servers(self._sync.urls)
        self._weight_version = version
        self._unusable_because = None

    def release_memory(self) -> None:
        """Let the servers of a colocated engine give their devices' memory up, until the next ``update_weights``. Collective.

        One that does not is ended, and started again by the next update.
        """
        if self._failed:
            self._require_usable()
        self._unusable_because = "its servers have given their memory up: call update_weights before generating"
        self._on_owner(self._make_room)

    def health(self) -> None:
        """Raise RolloutError unless every server that the engine uses can generate a token now."""
        self._require_usable()
        self._on_owner(self._check_servers)

    def server_loads(self) -> Mapping[str, ServerLoad]:
        """See ``RolloutEngine.server_loads``."""
        return self._client.last_loads

    def close(self) -> None:
        """Leave the weight-update group and end every server that the engine started. Safe to call twice."""
        if self._sync is not None:
            self._sync.close()
            self._sync = None
        if self._router_process is not None:
            self._router_process.close()
        if self._pool is not None:
            self._pool.close()
        self._transport.close()
        self._failed = True
        self._unusable_because = "it was closed"

    def _require_usable(self) -> None:
        if self._unusable_because is not None:
            raise RolloutError(f"the SGLang engine cannot be used: {self._unusable_because}")

    def _on_owner(self, action: Callable[[], T]) -> T:
        return on_one_rank(action, failure=_shared_error)

    def _prepare_servers(self) -> None:
        source = choose_source(self._config, self._served, self._transport, self._log_folder, self._serve_command)
        self._pool = ServerPool(self._config, self._transport, source, self._stop)
        self._pool.prepare()
        self._admission = Admission(self._config, self._served, self._pool, self._transport)
        if self._config.colocated:
            self._memory = ServerMemory(source, self._transport, self._config.control_timeout_s)
            self._make_room()

    def _find_router(self) -> Router | None:
        """The one that every rank sends its requests to."""
        if self._config.router is None:
            return None
        url = self._on_owner(self._start_router) if self._config.router == START_ROUTER else self._config.router
        return Router(url, self._transport, self._config)

    def _start_router(self) -> str:
        self._router_process = RouterProcess(self._config, self._transport, self._log_folder)
        return self._router_process.url

    def _send_requests_on(self) -> None:
        """To the servers that were updated, if a router does that."""
        assert self._sync is not None
        if self._router_process is not None:
            self._router_process.start_again()
        if self._router is not None:
            self._transport.submit(self._router.serve_by(self._sync.urls)).result()

    def _make_room(self) -> None:
        assert self._memory is not None
        self._memory.make_room()

    def _lost_servers(self) -> list[str]:
        assert self._pool is not None
        assert self._sync is not None
        lost = self._pool.silent(self._sync.urls)
        for url, reason in lost.items():
            _log.warning("%s was lost amid a weight update (%s): it begins anew without it", url, reason)
        return list(lost)

    def _join_servers(self, *, anew: bool = False) -> None:
        """Find a way to the servers that answer. Collective. ``anew``: even if it is the one that there is."""
        facts = self._on_owner(lambda: self._servers_to_join(anew))
        if facts is None:
            return
        if self._sync is not None:
            self._sync.close()
        shape = ModelShape.of(self._hf_config) if self._config.verify == "checksum" else None
        self._sync = WeightSync(facts, self._config, shape, self._dtype, self._transport, self._memory)

    def _servers_to_join(self, anew: bool) -> list[ServerFacts] | None:
        assert self._admission is not None
        known = self._sync.servers if self._sync is not None else None
        admitted = self._admission.admitted(self._weight_version, known)
        return known if admitted is None and anew else admitted

    def _check_servers(self) -> None:
        assert self._sync is not None
        for url in self._sync.urls:
            self._transport.call(url, "/health", None, self._config.control_timeout_s)


def _shared_error(error: Exception) -> Exception:
    """What all ranks raise for an error of one: what is no error of rollouts or of the request becomes a RolloutError."""
    if isinstance(error, (RolloutError, ValueError)):
        return error
    return RolloutError(f"{type(error).__name__}: {error}")
