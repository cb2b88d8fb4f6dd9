"""One SGLang server process: its command and environment, how it is started, and whether it is ready."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import socket
import sys
import time
from pathlib import Path

import torch

from megatron_dppo.errors import ConfigError, RolloutError, TransientServerError
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.servers.guarded_process import GuardedProcess
from megatron_dppo.rollout.sglang.servers.nodes import Nodes
from megatron_dppo.rollout.sglang.servers.scratch import Scratch
from megatron_dppo.rollout.sglang.servers.software import Software, software_of
from megatron_dppo.rollout.sglang.transport import Transport

_CPU_SHIM = Path(__file__).parents[1] / "cpu_shim"
_PLUGIN = Path(__file__).parents[1] / "server_plugin"
_HEALTH_TIMEOUT_S = 30.0  # /health generates one token and looks for it once a second
_PORTS_GIVEN_AWAY = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_PORT = 10000
_PORTS_TRIED = 100
_PORT_IS_TAKEN = b"address already in use"  # in the log of a server that ends over it
_STARTS = 3
_ASK_AGAIN_S = 0.5

# SGLang ends at start-up for a dense model with this flag, and ignores requests for choices without it.
EXPERT_CHOICES_FLAG = "--enable-return-routed-experts"
FP32_HEAD_FLAG = "--enable-fp32-lm-head"

# A server is a distributed job of its own: it must not find the trainer's rank or rendezvous in its environment.
_TRAINER_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
_TRAINER_PREFIXES = ("TORCHELASTIC_", "MASTER_PORT", "ROLE_")

# A CPU server takes memory for every bucket of weights that arrives, and gives it back. The C library would let it go to the
# system each time: 0.35 s of new pages for 512 MiB. It is kept, for the next bucket.
_CPU_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

# What serving on a CPU needs: plain PyTorch for every kernel, no captured graphs, and no busy waiting: an idle server would
# keep a core from the trainer that it waits for.
_CPU_FLAGS = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--grammar-backend": "none",
    "--mem-fraction-static": "0.3",
    "--max-total-tokens": "65536",
}
_CPU_SWITCHES = ["--disable-cuda-graph", "--disable-overlap-schedule", "--sleep-on-idle"]


def free_port() -> int:
    """A TCP port that was free a moment ago, and that the system gives to nobody who does not ask for it by number.

    A server binds its port when it has loaded the model; by then, one that the system gives away may be the near end of
    somebody's connection.
    """
    first_given_away = 32768
    with contextlib.suppress(OSError):
        first_given_away = int(_PORTS_GIVEN_AWAY.read_text().split()[0])
    ports = range(min(_FIRST_PORT, first_given_away // 2), first_given_away)
    for port in random.SystemRandom().sample(ports, min(len(ports), _PORTS_TRIED)):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise RolloutError(f"none of {_PORTS_TRIED} ports between {ports.start} and {ports.stop} is free")


class SGLangServer:
    """A server process that this process owns."""

    def __init__(
        self,
        config: SGLangConfig,
        model_folder: Path,
        dtype: str,
        log_folder: Path,
        index: int,
        return_routed_experts: bool = False,
        nodes: Nodes = Nodes(),  # noqa: B008  it cannot be changed
        fp32_head: bool = False,
    ) -> None:
        """``index``: of this server among those on this machine. ``nodes``: that share it with this machine."""
        self._nodes = nodes
        self.log_path = log_folder / f"sglang_server_{index}.log"
        self.url = ""
        self._config = config
        self._model_folder = model_folder
        self._dtype = dtype
        self._index = index
        self._return_routed_experts = return_routed_experts
        self._fp32_head = fp32_head
        self._python = config.python or sys.executable
        self._process: GuardedProcess | None = None
        self._starts_left = 0
        self._ready_by = 0.0

    def start(self) -> None:
        """Start the process and return at once."""
        self._starts_left = _STARTS
        self._ready_by = time.monotonic() + self._config.startup_timeout_s
        self._start()

    def _start(self) -> None:
        self.close()
        self._starts_left -= 1
        port = free_port()
        self.url = f"http://{self._config.host}:{port}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = self._command(port)
        scratch = Scratch(server_environment(self._config))
        command += self._key_arguments(scratch.folder / "keys.yaml")
        self._process = GuardedProcess(command, self.log_path, scratch.environment, scratch=scratch)

    def _command(self, port: int) -> list[str]:
        config = self._config
        command = [self._python, "-m", "sglang.launch_server", "--model-path", str(self._model_folder)]
        command += ["--host", config.host, "--port", str(port), "--dtype", self._dtype]
        command += [
            "--tp-size",
            str(config.tensor_model_parallel_size),
            "--skip-server-warmup",
            "--skip-tokenizer-init",
        ]
        command += [EXPERT_CHOICES_FLAG] if self._return_routed_experts else []
        command += self._nodes.arguments()
        command += [FP32_HEAD_FLAG] if self._fp32_head else []
        if torch.cuda.is_available():
            command += ["--enable-deterministic-inference"] if config.deterministic else []
            command += ["--enable-memory-saver"] if config.colocated else []  # it fails to start with it on a CPU
            command += [
                "--base-gpu-id",
                str(first_gpu(config, self._index, torch.cuda.device_count(), self._nodes.count)),
            ]
        else:
            command += [word for flag in _CPU_FLAGS.items() for word in flag] + _CPU_SWITCHES
        return command + list(config.extra_args)

    def _key_arguments(self, key_file: Path) -> list[str]:
        """The keys by way of a file that is nobody else's: arguments are there for all to see, in the log as well."""
        keys = {"api-key": self._config.keys.api, "admin-api-key": self._config.keys.admin}
        keys = {name: key for name, key in keys.items() if key is not None}
        if not keys:
            return []
        with os.fdopen(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(keys, file)  # which is YAML too
        return ["--config", str(key_file)]

    def is_ready(self, transport: Transport) -> bool:
        """Whether it generates tokens by now. Raises RolloutError, with the log's end, if it never will."""
        assert self._process is not None, "start it first"
        if not self._process.is_running():
            if self._starts_left > 0 and _PORT_IS_TAKEN in self._process.output():
                self._start()  # with another one
                return False
            raise RolloutError(f"the SGLang server ended while starting up. {self._process.log_tail()}")
        try:
            patience = min(_HEALTH_TIMEOUT_S, self._config.startup_timeout_s)
            transport.call(self.url, "/health", None, patience)
            # A server asks this of itself, but without a warm-up before it listens, and then it is not done: a CPU server
            # went through all that it has ever imported for garbage whenever its cache was flushed, 0.37 s of every update.
            # The first node tells the others of its server, which answer nothing but /health.
            if self._nodes.rank == 0:
                transport.call(self.url, "/freeze_gc", None, patience)
            return True
        except TransientServerError:
            if time.monotonic() < self._ready_by:
                return False
        tail = self._process.log_tail()
        self.close()
        limit = self._config.startup_timeout_s
        raise RolloutError(f"the SGLang server was not ready after startup_timeout_s = {limit:g} s. {tail}")

    def wait_until_ready(self, transport: Transport) -> None:
        """Return when it generates tokens. Raises RolloutError if it never will."""
        while not self.is_ready(transport):
            time.sleep(_ASK_AGAIN_S)

    def is_running(self) -> bool:
        """Whether the process that was started has not ended."""
        return self._process is not None and self._process.is_running()

    @property
    def pid(self) -> int | None:
        """Of the process group of the server and all that it started; None: it was not started."""
        return None if self._process is None else self._process.pid

    def software(self) -> Software | None:
        """What its interpreter brings, asked of the interpreter; None if that does not say."""
        return software_of(self._python, server_environment(self._config))

    def ask_to_end(self) -> None:
        """Tell it to end, without waiting."""
        if self._process is not None:
            self._process.ask_to_end()

    def close(self) -> None:
        """End the server and every process of its group; nothing of them is left. Safe to call twice."""
        if self._process is not None:
            self._process.end()
            self._process = None


def server_environment(config: SGLangConfig) -> dict[str, str]:
    """The trainer's environment without its distributed settings, plus what a server needs on a CPU."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _TRAINER_VARIABLES and not name.startswith(_TRAINER_PREFIXES)
    }
    # The server has its own interpreter: what the trainer finds through PYTHONPATH is not meant for it.
    environment["PYTHONPATH"] = str(_PLUGIN)
    environment.setdefault("HF_HUB_OFFLINE", "1")  # the model is a local folder
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where SGLang has it; one that has it in TMPDIR would compile everything anew at every start (see scratch.py).
    cache = Path(environment.get("SGLANG_CACHE_DIR", "~/.cache/sglang")).expanduser()
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    if not torch.cuda.is_available():
        environment["PYTHONPATH"] = os.pathsep.join([str(_CPU_SHIM), str(_PLUGIN)])
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        for name, value in _CPU_MALLOC.items():
            environment.setdefault(name, value)
        library = importlib.util.find_spec("megatron_dppo._tile_hash")  # without it the shim hashes in torch
        if library is not None and library.origin is not None:
            environment["MEGATRON_DPPO_TILE_HASH_LIBRARY"] = library.origin
        environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _cpu_binding(config.tensor_model_parallel_size))
        if config.deterministic:
            environment["MEGATRON_DPPO_SEEDED_SAMPLING"] = "1"
    return environment


def _cpu_binding(tp_size: int) -> str:
    """This process's cores dealt out to the ranks, in SGLang's form ``0,1|2,3``; left to itself it wants whole sockets."""
    cores = sorted(os.sched_getaffinity(0))
    per_rank = max(1, len(cores) // tp_size)
    starts = [rank * per_rank % len(cores) for rank in range(tp_size)]
    return "|".join(",".join(str(core) for core in cores[start : start + per_rank]) for start in starts)


def first_gpu(config: SGLangConfig, server_index: int, gpu_count: int, hosts: int = 1) -> int:
    """The first GPU of a server; by default the servers follow the trainer's ranks on this machine.

    ``hosts`` share the server's GPUs evenly.
    """
    trainer_gpus = 0 if config.colocated else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    base = trainer_gpus if config.base_gpu_id is None else config.base_gpu_id
    gpus = config.tensor_model_parallel_size // hosts
    first = base + server_index * gpus
    last = first + gpus - 1
    if last >= gpu_count:
        raise ConfigError(
            f"SGLang server {server_index} needs GPUs {first} to {last}, but this machine has {gpu_count}. Lower num_servers"
            " or tensor_model_parallel_size, set base_gpu_id, or start servers elsewhere (docs/servers.md)"
        )
    return first
