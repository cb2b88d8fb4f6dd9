"""One SGLang server process: started, waited for, watched, and always ended together with everything it started."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch

from megatron_dppo.errors import ConfigError, RolloutError, TransientServerError
from megatron_dppo.models.hf.config_json import read_config_json
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.routed_experts import SERVER_FLAG
from megatron_dppo.rollout.sglang.transport import Transport

_HERE = Path(__file__).parent
_LOG_TAIL_BYTES = 4000
_HEALTH_TIMEOUT_S = 30.0  # /health generates one token and looks for it once a second
_TERMINATE_GRACE_S = 3.0
_PORTS_GIVEN_AWAY = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_PORT = 10000
_PORTS_TRIED = 100
_PORT_IS_TAKEN = "address already in use"  # in the log of a server that ends over it
_STARTS = 3

# A server is a distributed job of its own: it must not find the trainer's rank or rendezvous in its environment.
_TRAINER_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
_TRAINER_PREFIXES = ("TORCHELASTIC_", "MASTER_PORT", "ROLE_")

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


def prepare_served_folder(model_folder: Path, target: Path) -> Path:
    """Make ``target`` a view of ``model_folder`` (links) in which no end-of-sequence token is configured.

    SGLang always stops at the model's own eos_token_id, whereas a rollout ends at SamplingParams.stop_token_ids and
    nowhere else. The generation config, which could also switch on top-p sampling, is left out altogether.
    """
    config = read_config_json(model_folder)
    shutil.rmtree(target, ignore_errors=True)  # links that an earlier run made, maybe to another model
    target.mkdir(parents=True)
    for source in model_folder.iterdir():
        if source.name not in ("config.json", "generation_config.json"):
            (target / source.name).symlink_to(source.resolve())
    config["eos_token_id"] = None
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return target


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
    ) -> None:
        self.log_path = log_folder / f"sglang_server_{index}.log"
        self.url = ""
        self._key_file = log_folder / f"sglang_server_{index}_keys.yaml"
        self._config = config
        self._model_folder = model_folder
        self._dtype = dtype
        self._index = index
        self._return_routed_experts = return_routed_experts
        self._process: subprocess.Popen[bytes] | None = None
        self._starts_left = 0
        self._log_start = 0  # of the present process

    def start(self) -> None:
        """Start the process and return at once; ``wait_until_ready`` waits."""
        self._starts_left = _STARTS
        self._start()

    def _start(self) -> None:
        self.close()
        self._starts_left -= 1
        port = free_port()
        self.url = f"http://{self._config.host}:{port}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = self._spawn(self._command(port), log)
        atexit.register(self.close)

    def _spawn(self, command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        guard = [sys.executable, str(_HERE / "server_guard.py"), str(os.getpid())]
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        try:
            return subprocess.Popen(
                guard + command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(self._config),
                start_new_session=True,
            )
        except OSError as error:
            raise RolloutError(f"the SGLang server cannot be started: {error}") from error

    def _command(self, port: int) -> list[str]:
        config = self._config
        python = config.python or sys.executable
        command = [python, "-m", "sglang.launch_server", "--model-path", str(self._model_folder)]
        command += ["--host", config.host, "--port", str(port), "--dtype", self._dtype]
        command += [
            "--tp-size",
            str(config.tensor_model_parallel_size),
            "--skip-server-warmup",
            "--skip-tokenizer-init",
        ]
        command += [SERVER_FLAG] if self._return_routed_experts else []
        command += self._key_arguments()
        if torch.cuda.is_available():
            command += ["--enable-deterministic-inference"] if config.deterministic else []
            command += ["--base-gpu-id", str(first_gpu(config, self._index, torch.cuda.device_count()))]
        else:
            command += [word for flag in _CPU_FLAGS.items() for word in flag] + _CPU_SWITCHES
        return command + list(config.extra_args)

    def _key_arguments(self) -> list[str]:
        """The keys by way of a file that is nobody else's: arguments are there for all to see, in the log as well."""
        keys = {"api-key": self._config.keys.api, "admin-api-key": self._config.keys.admin}
        keys = {name: key for name, key in keys.items() if key is not None}
        if not keys:
            return []
        self._key_file.unlink(missing_ok=True)
        with os.fdopen(os.open(self._key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(keys, file)  # which is YAML too
        return ["--config", str(self._key_file)]

    def wait_until_ready(self, transport: Transport) -> None:
        """Return when the server has generated a token. Raises RolloutError, with the log's end, if it does not."""
        deadline = time.monotonic() + self._config.startup_timeout_s
        while time.monotonic() < deadline:
            if not self.is_running():
                if self._starts_left > 0 and _PORT_IS_TAKEN.encode() in self.log_path.read_bytes()[self._log_start :]:
                    self._start()  # with another one
                    continue
                raise RolloutError(f"the SGLang server ended while starting up. {self._log_tail()}")
            try:
                transport.call(self.url, "/health", None, min(_HEALTH_TIMEOUT_S, self._config.startup_timeout_s))
                return
            except TransientServerError:
                time.sleep(0.5)
        self.close()
        limit = self._config.startup_timeout_s
        raise RolloutError(f"the SGLang server was not ready after startup_timeout_s = {limit:g} s. {self._log_tail()}")

    def is_running(self) -> bool:
        """Whether the process that was started has not ended."""
        return self._process is not None and self._process.poll() is None

    def _log_tail(self) -> str:
        tail = self.log_path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        return f"The end of {self.log_path}:\n{tail}"

    def close(self) -> None:
        """End the server and every process of its group. Safe to call twice."""
        self._key_file.unlink(missing_ok=True)
        if self._process is None:
            return
        process, self._process = self._process, None
        group = process.pid  # the guard leads the session that it was started in
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + _TERMINATE_GRACE_S
        while _group_exists(group) and time.monotonic() < deadline:
            process.poll()  # reap it: a zombie would keep the group alive
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        process.wait()
        atexit.unregister(self.close)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def server_environment(config: SGLangConfig) -> dict[str, str]:
    """The trainer's environment without its distributed settings, plus what a server needs on a CPU."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _TRAINER_VARIABLES and not name.startswith(_TRAINER_PREFIXES)
    }
    # The server has its own interpreter: what the trainer finds through PYTHONPATH is not meant for it.
    environment.pop("PYTHONPATH", None)
    environment.setdefault("HF_HUB_OFFLINE", "1")  # the model is a local folder
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        environment["PYTHONPATH"] = str(_HERE / "cpu_shim")
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
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


def first_gpu(config: SGLangConfig, server_index: int, gpu_count: int) -> int:
    """The first GPU of a server; by default the servers follow the trainer's ranks on this machine."""
    trainer_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    base = trainer_gpus if config.base_gpu_id is None else config.base_gpu_id
    first = base + server_index * config.tensor_model_parallel_size
    last = first + config.tensor_model_parallel_size - 1
    if last >= gpu_count:
        raise ConfigError(
            f"SGLang server {server_index} needs GPUs {first} to {last}, but this machine has {gpu_count}. Lower "
            "num_servers or tensor_model_parallel_size, set base_gpu_id, or start servers elsewhere and name them in urls"
        )
    return first
