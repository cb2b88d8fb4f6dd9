"""Options of the SGLang rollout engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dppo.errors import ConfigError
from megatron_dppo.rollout.sglang.keys import ServerKeys

VERIFY_CHOICES = ("checksum", "none")
SERVED_DTYPES = ("float32", "bfloat16", "float16")
START_ROUTER = "start"
ROUTER_DROPS_EXPERTS = (
    "SGLangConfig.router: sglang-router does not pass the request for expert choices on, which routing replay needs: leave"
    " router out (requests are then sent to the servers themselves), or set algorithm.routing_replay=false"
)


@dataclass
class SGLangConfig:
    """How servers are started or found, asked, and given new weights.

    Attributes:
        python: interpreter that has SGLang installed; None: the trainer's own. The trainer itself never imports SGLang.
        urls: attach to these running servers instead of starting any, e.g. ``["http://10.0.0.5:30000"]``.
        registry: attach to the servers that are registered in this folder, which all hosts share (``python -m
            megatron_dppo.serve`` registers those that it starts), or stand in this text file, one address a line. Read again
            before every update: whoever has joined takes part from then on.
        launch: shell command that starts the servers of a host, where the trainer runs beside no GPU of theirs:
            ``srun --nodes 1 --ntasks 1 --nodelist {host} {serve}`` or ``ssh {host} "{serve}"``. It is run for each of
            ``launch_hosts``, started again if it ends, and ended with the run. ``{serve}`` becomes ``python -m
            megatron_dppo.serve ...``; its servers register in ``registry``, by default a folder of the run's.
        launch_hosts: for ``{host}``. Empty: the command is run once, without one.
        router: address of a running sglang-router that requests for responses are sent through, or ``start``: one is started,
            with the interpreter ``python``, and ends with the run. None: the trainer chooses servers itself (docs/servers.md
            compares the two). It serves this run alone, and drops expert choices: not with routing replay.
        num_servers: servers in all, each with a full copy of the policy: that are started, or have to be there at the start.
        min_servers: fewer that answer when weights are updated stop the run, with a checkpoint. At the start, and if they
            are ``colocated``, all have to be there.
        tensor_model_parallel_size: GPUs (or processes, on a CPU) per server.
        colocated: the servers share the trainer's GPUs, one rank of a server on each, and take turns with it: they give their
            memory up for the update, whose optimizer state waits in host memory while they generate. One host only; see
            docs/colocation.md.
        dtype: dtype the servers compute in: float32 | bfloat16 | float16; None: the trainer's.
        host: address that servers started by the trainer listen on and that every trainer rank reaches them by.
        base_gpu_id: first GPU of the first server; None: the one after the trainer's own on this machine.
        deterministic: honour ``SamplingParams.seed`` (SGLang's batch-invariant mode, which is slower on a GPU).
            Otherwise responses differ from run to run.
        startup_timeout_s: seconds until a server must answer, whether it is started or found.
        request_timeout_s: seconds that a server may go without any progress (no token generated, no request finished) before
            the requests on it are taken elsewhere. A response may take longer; ``generate_timeout_s`` bounds it. On a
            server that does not report its load (``/v1/loads``) finished requests alone are progress.
        generate_timeout_s: seconds until a whole ``generate`` call must be complete.
        sync_timeout_s: seconds until one weight update, verification included, must be complete.
        hang_timeout_s: seconds that a server started here, by the trainer or by ``megatron_dppo.serve``, may go without
            being healthy before it is ended and started again. One that is paused for a weight update is not, so this has
            to be above ``sync_timeout_s``.
        control_timeout_s: seconds until any other call (health, pause, ...) must be answered.
        max_attempts: how often a request is tried (on whatever servers are alive) before giving up.
        max_concurrent_requests: requests that one model replica keeps in flight over all servers.
        bucket_bytes: weights are sent in buckets of about this size.
        max_senders: trainer ranks that send weights, at most. Each has a communicator with all servers, which takes memory on
            every one of their GPUs.
        verify: ``checksum``: after an update, every parameter that the servers hold is compared with what was exported.
            ``none``: trust the server (for layouts whose checksums cannot be predicted, e.g. quantised weights,
            experts packed for one GPU's kernels).
        master_address: address of the trainer's rank 0 as seen from the servers; None: found by asking the routing
            table.
        api_key_variable: environment variable with the key that servers ask for (SGLang's ``--api-key``); started servers get
            it. None: they ask for none, and whoever reaches them can use them.
        admin_api_key_variable: likewise (``--admin-api-key``), for what changes a server: above all its weights.
        extra_args: further arguments for ``python -m sglang.launch_server``, e.g. ``["--mem-fraction-static", "0.8"]``.
    """

    python: str | None = None
    urls: list[str] = field(default_factory=list)
    registry: str | None = None
    launch: str | None = None
    launch_hosts: list[str] = field(default_factory=list)
    router: str | None = None
    num_servers: int = 1
    min_servers: int = 1
    tensor_model_parallel_size: int = 1
    colocated: bool = False
    dtype: str | None = None
    host: str = "127.0.0.1"
    base_gpu_id: int | None = None
    deterministic: bool = False
    startup_timeout_s: float = 600.0
    request_timeout_s: float = 300.0
    generate_timeout_s: float = 7200.0
    sync_timeout_s: float = 600.0
    hang_timeout_s: float = 1200.0
    control_timeout_s: float = 60.0
    max_attempts: int = 5
    max_concurrent_requests: int = 256
    bucket_bytes: int = 512 * 1024 * 1024
    max_senders: int = 4
    verify: str = "checksum"
    master_address: str | None = None
    api_key_variable: str | None = None
    admin_api_key_variable: str | None = None
    extra_args: list[str] = field(default_factory=list)

    @property
    def keys(self) -> ServerKeys:
        """Raises ConfigError if they are not where they should be."""
        return ServerKeys.read(self.api_key_variable, self.admin_api_key_variable)

    @property
    def starts_servers_here(self) -> bool:
        """Whether the trainer's rank 0 starts them, as its own processes."""
        return not self.urls and self.registry is None and self.launch is None

    @property
    def fewest_servers(self) -> int:
        """That have to answer. On shared GPUs all, as one that loads meanwhile would find its memory in use."""
        return self.num_servers if self.colocated else self.min_servers

    def check(self) -> None:
        """Raise ConfigError naming the first field whose value cannot work."""
        positive = (
            "num_servers min_servers tensor_model_parallel_size startup_timeout_s request_timeout_s generate_timeout_s "
            "sync_timeout_s control_timeout_s max_attempts max_concurrent_requests bucket_bytes "
            "max_senders"
        )
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise ConfigError(f"SGLangConfig.{name} must be positive, not {getattr(self, name)}")
        _ = self.keys
        if self.request_timeout_s >= self.generate_timeout_s:
            raise ConfigError(
                f"SGLangConfig.request_timeout_s = {self.request_timeout_s:g} must be below generate_timeout_s = "
                f"{self.generate_timeout_s:g}: the requests on a server that hangs would never be taken elsewhere. Lower "
                "request_timeout_s or raise generate_timeout_s"
            )
        if self.hang_timeout_s <= self.sync_timeout_s:
            raise ConfigError(
                f"SGLangConfig.hang_timeout_s = {self.hang_timeout_s:g} must be above sync_timeout_s = "
                f"{self.sync_timeout_s:g}: servers amid a weight update would be taken for hung. Raise hang_timeout_s"
            )
        self._check_source()
        if self.router is not None and self.router != START_ROUTER and not _is_address(self.router):
            raise ConfigError(
                f"SGLangConfig.router must be the address of a router, http://..., or {START_ROUTER!r}, not {self.router!r}"
            )
        servers = len(self.urls) or self.num_servers
        if self.min_servers > servers:
            raise ConfigError(
                f"SGLangConfig.min_servers = {self.min_servers}, but there are {servers} servers: lower it"
            )
        if self.verify not in VERIFY_CHOICES:
            raise ConfigError(f"SGLangConfig.verify must be one of {', '.join(VERIFY_CHOICES)}, not {self.verify!r}")
        if self.dtype is not None and self.dtype not in SERVED_DTYPES:
            raise ConfigError(f"SGLangConfig.dtype must be one of {', '.join(SERVED_DTYPES)}, not {self.dtype!r}")
        if self.base_gpu_id is not None and self.base_gpu_id < 0:
            raise ConfigError(f"SGLangConfig.base_gpu_id must be at least 0, not {self.base_gpu_id}")
        if self.colocated:
            self._check_colocated()
        if not self.host:
            raise ConfigError("SGLangConfig.host is empty: give the address that started servers listen on")

    def _check_source(self) -> None:
        if self.urls and (self.registry is not None or self.launch is not None):
            other = "registry" if self.registry is not None else "launch"
            raise ConfigError(f"SGLangConfig: urls and {other} both say where servers are: leave one of them out")
        if self.launch is not None:
            self._check_launch(self.launch)
        elif self.launch_hosts:
            raise ConfigError("SGLangConfig.launch_hosts names hosts, but launch has no command to run on them")
        for host in self.launch_hosts:
            if self.launch_hosts.count(host) > 1:
                raise ConfigError(f"SGLangConfig.launch_hosts: {host!r} is listed twice")
        for url in self.urls:
            if not _is_address(url):
                raise ConfigError(f"SGLangConfig.urls: {url!r} does not start with http:// or https://")
            if self.urls.count(url) > 1:
                raise ConfigError(f"SGLangConfig.urls: {url!r} is listed twice: each server takes part in a sync once")

    def _check_launch(self, template: str) -> None:
        fault = None
        if "{serve}" not in template:
            fault = "has no {serve}: the command that is to run on a host"
        elif self.launch_hosts and "{host}" not in template:
            fault = "has no {host}, but launch_hosts names some"
        elif "{host}" in template and not self.launch_hosts:
            fault = "speaks of a {host}: name them in launch_hosts"
        if fault is not None:
            raise ConfigError(f"SGLangConfig.launch = {template!r} {fault}")

    def _check_colocated(self) -> None:
        for source in ("urls", "registry", "launch"):
            if getattr(self, source):
                raise ConfigError(
                    f"SGLangConfig.colocated=true with {source}: servers on the trainer's GPUs are started by the trainer."
                    f" Remove {source}, or set colocated=false"
                )
        if self.base_gpu_id is not None:
            raise ConfigError(
                f"SGLangConfig.base_gpu_id = {self.base_gpu_id} with colocated=true: the servers are on the trainer's GPUs."
                " Remove base_gpu_id"
            )


def _is_address(url: str) -> bool:
    return url.startswith(("http://", "https://"))
