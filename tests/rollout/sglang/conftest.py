"""Real SGLang servers for the tests of this folder, started once a session and all at the same time.

MEGATRON_DPPO_SGLANG_PYTHON names the interpreter that has SGLang installed (tools/setup/install_sglang_cpu.sh makes one).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_dppo.rollout.sglang import SGLangConfig, SGLangEngine
from megatron_dppo.rollout.sglang.servers import guarded_process
from megatron_dppo.rollout.sglang.servers.served_policy import prepare_served_folder
from megatron_dppo.rollout.sglang.servers.server import SGLangServer
from megatron_dppo.rollout.sglang.transport import Transport
from tests.models.tiny_policies import tiny_hf_model, write_tiny_hf_model

SERVER_PYTHON = os.environ.get("MEGATRON_DPPO_SGLANG_PYTHON")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("sglang") and not SERVER_PYTHON:
            item.add_marker(
                pytest.mark.skip(reason="MEGATRON_DPPO_SGLANG_PYTHON does not name an interpreter that has SGLang")
            )


@dataclass(frozen=True)
class RunningServer:
    """A server that serves a tiny model, and what an engine needs to attach to it."""

    kind: str
    config: SGLangConfig
    model_folder: Path
    log_folder: Path

    def attach(
        self,
        return_routed_experts: bool = False,
        replica_group: dist.ProcessGroup | None = None,
        **options: object,
    ) -> SGLangEngine:
        config = SGLangConfig(**{**vars(self.config), **options})
        with pytest.MonkeyPatch.context() as patch:
            # On a CPU a server that is there already is on the trainer's devices as much as one that is started.
            patch.setattr(SGLangConfig, "_check_colocated", lambda _: None)
            return SGLangEngine(
                config,
                self.model_folder,
                vocab_size=250,
                dtype=torch.float32,
                log_folder=self.log_folder,
                replica_group=replica_group,
                return_routed_experts=return_routed_experts,
            )


def server_config(**options: object) -> SGLangConfig:
    """Bounds that end a stuck test within minutes, and seeded sampling."""
    defaults = {"sync_timeout_s": 60.0, "request_timeout_s": 60.0, "generate_timeout_s": 200.0, "deterministic": True}
    return SGLangConfig(**{"python": SERVER_PYTHON, "startup_timeout_s": 600.0, **defaults, **options})


def checkpoint_tensors(hf_model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights under the names of a checkpoint; a state_dict may keep experts under other names."""
    with tempfile.TemporaryDirectory() as folder:
        hf_model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def tiny_weights(kind: str, seed: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    hf_model = tiny_hf_model(kind, seed)
    return hf_model, checkpoint_tensors(hf_model)


@pytest.fixture(scope="session", autouse=True)
def _servers_end_at_once() -> Iterator[None]:
    """One that is asked to end waits for requests that nobody sends any more, until it is killed: 3 s for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guarded_process, "_TERMINATE_GRACE_S", 0.2)
        yield


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], RunningServer]]:
    """``servers("qwen3_moe")``: mixture of experts on one rank; ``servers("qwen3_tied")``: dense, on two ranks."""
    started, running = [], {}
    transport = Transport()
    try:
        for index, (kind, tp_size) in enumerate({"qwen3_moe": 1, "qwen3_tied": 2}.items()):
            root = tmp_path_factory.mktemp(kind)
            folder = write_tiny_hf_model(kind, root / "model", seed=0, max_position_embeddings=384)
            # The load after every step, not every 15: time-outs of tests are nearer to a step than those of runs.
            extra_args = ["--load-snapshot-publish-interval", "1"]
            config = server_config(tensor_model_parallel_size=tp_size, extra_args=extra_args)
            served = prepare_served_folder(folder, root / "served")
            server = SGLangServer(config, served, "float32", root, index, return_routed_experts=kind == "qwen3_moe")
            server.start()
            started.append(server)
            running[kind] = RunningServer(kind, server_config(urls=[server.url]), folder, root)
        for server in started:
            server.wait_until_ready(transport)
        yield running.__getitem__
    finally:
        for server in started:
            server.close()
        transport.close()
