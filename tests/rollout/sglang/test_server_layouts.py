"""Servers that divide the model in other ways than by tensor parallelism are updated and verified like all others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dppo.errors import WeightSyncError
from megatron_dppo.models.hf.export import PolicyWeights
from megatron_dppo.rollout.sample import SamplingParams
from megatron_dppo.rollout.sglang import SGLangEngine, broadcast_route, tensor_route
from megatron_dppo.rollout.sglang.servers.served_policy import prepare_served_folder
from megatron_dppo.rollout.sglang.servers.server import SGLangServer
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.models.policy_runs import loaded_policy
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rank_pool import RankPools
from tests.rollout.engine_contract import EngineUnderTest, assert_log_probs_match, make_prompts
from tests.rollout.sglang.conftest import RunningServer, server_config, tiny_weights

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(600)]

EP, DP_ATTENTION = ["--ep-size", "2"], ["--enable-dp-attention", "--dp-size", "2"]
TRAINERS = {
    "TP2 EP2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2 PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("arguments", "route"),
    [
        pytest.param(EP, broadcast_route, id="EP2"),
        pytest.param(DP_ATTENTION, broadcast_route, id="DP attention", marks=pytest.mark.nightly),
        pytest.param(
            [*DP_ATTENTION, "--enable-dp-lm-head"],
            broadcast_route,
            id="DP attention and output layer",
            marks=pytest.mark.nightly,
        ),
        pytest.param(EP, tensor_route, id="EP2, colocated", marks=pytest.mark.nightly),
        pytest.param(DP_ATTENTION, tensor_route, id="DP attention, colocated", marks=pytest.mark.nightly),
    ],
)
def test_new_weights_are_served_and_a_wrong_one_is_found(
    arguments: list[str], route: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_hf_model("qwen3_moe", tmp_path / "model", seed=0)
    options = {"extra_args": arguments, "bucket_bytes": 32768, "colocated": route is tensor_route}
    config = server_config(tensor_model_parallel_size=2, **options)
    engine = SGLangEngine(config, folder, vocab_size=250, dtype=torch.float32, log_folder=tmp_path)
    try:
        for version in (1, 2):
            hf_model, tensors = tiny_weights("qwen3_moe", seed=version)
            engine.update_weights(WholeWeights(tensors), version)
        samples = engine.generate(make_prompts(250, [5, 9, 4]), SamplingParams(max_new_tokens=6, samples_per_prompt=4))
        assert_log_probs_match(EngineUnderTest(engine, hf_model, lambda *_: None), samples, 1.0)

        intact = route.flatten

        def flip_one_bit(parts, buffer):
            flat, offset = intact(parts, buffer), 0
            for part in parts:
                if part.shape == tensors[EXPERT].shape and torch.equal(part, tensors[EXPERT]):
                    flat[offset] ^= 1
                offset += part.nbytes
            return flat

        monkeypatch.setattr(route, "flatten", flip_one_bit)
        with pytest.raises(WeightSyncError, match="differs") as raised:
            engine.update_weights(WholeWeights(tensors), 3)
        _, fault = str(raised.value).splitlines()
        assert fault == f"  {EXPERT}: the server's model.layers.1.mlp.experts.w13_weight differs from what was exported"
    finally:
        engine.close()


@pytest.fixture(
    scope="module",
    params=[pytest.param([], id="TP2"), pytest.param(EP, id="EP2"), pytest.param(DP_ATTENTION, id="DP attention")],
)
def two_servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Two servers with two ranks each, which divide the model alike."""
    root = tmp_path_factory.mktemp("servers")
    folder = write_tiny_hf_model("qwen3_moe", root / "model", seed=0)
    config = server_config(tensor_model_parallel_size=2, extra_args=request.param)
    served = prepare_served_folder(folder, root / "served")
    transport = Transport()
    servers = [SGLangServer(config, served, "float32", root, index) for index in range(2)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready(transport)
        urls = [server.url for server in servers]
        yield RunningServer("qwen3_moe", server_config(urls=urls, sync_timeout_s=200.0), folder, root)
    finally:
        for server in servers:
            server.close()
        transport.close()


def _update_often(server: RunningServer, folder: str, layout: dict[str, Any], updates: int) -> tuple[int, int]:
    """(updates that were proven, ranks that sent)."""
    chunks = loaded_policy(folder, layout)
    weights = PolicyWeights(chunks)
    engine = server.attach(bucket_bytes=131072, max_senders=4, replica_group=dist.group.WORLD)
    for version in range(1, updates + 1):
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(1.01)
        engine.update_weights(weights, version)
    proven, senders = engine.weight_version, len(engine._sync._route._senders)
    dist.barrier()
    engine.close()
    return proven, senders


@pytest.mark.nightly
@pytest.mark.timeout(1800)  # DP attention keeps a core of each server busy even when it waits
@pytest.mark.parametrize("trainer", TRAINERS)
def test_twenty_updates_in_a_row_are_proven(
    two_servers: RunningServer, trainer: str, ranks: RankPools, tmp_path: Path
) -> None:
    write_tiny_hf_model("qwen3_moe", tmp_path, seed=1)
    results = ranks(4).run(_update_often, two_servers, str(tmp_path), TRAINERS[trainer], 20, timeout=1500.0)
    assert all(proven == 20 and senders > 1 for proven, senders in results)
