"""Servers on the trainer's devices: they give memory up and take it back in order, and get weights by handle, proven."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dppo.errors import RolloutError, WeightSyncError
from megatron_dppo.models.hf.export import PolicyWeights
from megatron_dppo.rollout.sample import SamplingParams
from megatron_dppo.rollout.sglang import tensor_route
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.models.policy_runs import loaded_policy
from tests.models.tiny_policies import tiny_hf_model, write_tiny_hf_model
from tests.rank_pool import RankPools
from tests.rollout.engine_contract import EngineUnderTest, assert_log_probs_match, make_prompts
from tests.rollout.sglang.conftest import RunningServer, tiny_weights
from tests.waiting import wait_until

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

SAMPLING = SamplingParams(max_new_tokens=6, samples_per_prompt=2)
TP2, PP2, EP2 = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"expert_model_parallel_size": 2},
)
EVERYTHING = {"tags": ["cuda_graph", "kv_cache", "weights"]}


@pytest.fixture(params=["qwen3_moe", "qwen3_tied"])  # of one rank and of two
def server(request, servers):
    return servers(request.param)


def _assert_serves(engine, hf_model) -> None:
    samples = engine.generate(make_prompts(250, [5, 9]), SAMPLING)
    assert_log_probs_match(EngineUnderTest(engine, hf_model, lambda *_: None), samples, 1.0)


def _shared_files() -> set[Path]:
    """This process's."""
    return set(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))


def test_new_weights_are_served_in_one_or_many_buckets(server):
    for first, bucket_bytes in ((1, 512 * 2**20), (3, 8192)):
        engine = server.attach(colocated=True, bucket_bytes=bucket_bytes)
        for version in (first, first + 1):
            hf_model, tensors = tiny_weights(server.kind, version)
            engine.update_weights(WholeWeights(tensors), version)
            _assert_serves(engine, hf_model)
            engine.release_memory()
        engine.close()
    wait_until(lambda: not _shared_files(), within_s=10, what="shared memory that is given back")


def test_servers_are_asked_in_this_order(server, monkeypatch):
    asked: list[tuple[str, Any]] = []
    request = Transport.request

    async def recorded(self: Transport, url: str, path: str, body: Any, timeout_s: float) -> Any:
        asked.append((path, body if body and "tags" in body else None))
        return await request(self, url, path, body, timeout_s)

    monkeypatch.setattr(Transport, "request", recorded)
    engine = server.attach(colocated=True)
    resting = [("/pause_generation", None), ("/flush_cache", None), ("/release_memory_occupation", EVERYTHING)]
    assert asked[-3:] == resting

    _, tensors = tiny_weights(server.kind, seed=1)
    engine.update_weights(WholeWeights(tensors), 1)
    update = [
        ("/resume_memory_occupation", {"tags": ["weights"]}),
        ("/begin_weight_update", None),
        ("/update_weights_from_tensor", None),
        ("/end_weight_update", None),
        ("/weights_checker", None),
        ("/update_weight_version", None),
        ("/resume_memory_occupation", {"tags": ["cuda_graph", "kv_cache"]}),
        ("/continue_generation", None),
    ]
    assert asked[-len(update) :] == update

    asked.clear()
    engine.release_memory()
    engine.release_memory()  # which has nothing left to ask for
    assert asked == resting

    asked.clear()
    engine.update_weights(WholeWeights(tensors), 2)
    engine.update_weights(WholeWeights(tensors), 3)  # without a release: it is made up for
    assert [entry for entry in asked if entry[0] not in ("/model_info", "/server_info")] == [*update, *resting, *update]
    engine.close()


def test_nothing_is_generated_while_servers_have_no_memory(server):
    hf_model, tensors = tiny_weights(server.kind, seed=1)
    engine = server.attach(colocated=True)
    engine.update_weights(WholeWeights(tensors), 1)
    engine.release_memory()
    with pytest.raises(RolloutError, match="given their memory up: call update_weights"):
        engine.generate(make_prompts(250, [4]), SAMPLING)
    engine.update_weights(WholeWeights(tensors), 2)
    _assert_serves(engine, hf_model)
    engine.close()


def _update_often(server: RunningServer, folder: str, layout: dict[str, Any], updates: int) -> list[Any]:
    weights = PolicyWeights(loaded_policy(folder, layout))
    engine = server.attach(colocated=True, bucket_bytes=16384, replica_group=dist.group.WORLD)
    for version in range(1, updates + 1):
        engine.release_memory()
        engine.update_weights(weights, version)
    samples = engine.generate(make_prompts(250, [5, 9]), SAMPLING)
    dist.barrier()
    engine.close()
    return samples


# A server's two ranks get theirs from two that have half of the layers (PP2) or half of each (TP2), and a server's one rank
# from the first of four.
@pytest.mark.parametrize(
    ("kind", "layout", "number"),
    [
        pytest.param("qwen3_tied", TP2, 2, id="TP2"),
        pytest.param("qwen3_tied", PP2, 2, id="PP2"),
        pytest.param("qwen3_moe", TP2 | EP2, 4, id="TP2 EP2"),
        pytest.param(
            "qwen3_moe", TP2 | PP2, 4, id="TP2 PP2", marks=pytest.mark.nightly
        ),  # on every push the three above
    ],
)
def test_a_policy_of_several_ranks_is_served(kind, layout, number, ranks: RankPools, servers, tmp_path) -> None:
    write_tiny_hf_model(kind, tmp_path, seed=5)
    samples, *others = ranks(number).run(_update_often, servers(kind), str(tmp_path), layout, 2)
    assert others == [[]] * (number - 1)
    assert_log_probs_match(EngineUnderTest(None, tiny_hf_model(kind, 5), lambda *_: None), samples, 1.0)


def _flip_in(victim: torch.Tensor, parts: Sequence[torch.Tensor], flat: torch.Tensor) -> None:
    offset = 0
    for part in parts:
        if part.shape == victim.shape and torch.equal(part, victim):
            flat[offset + part.nbytes // 2] ^= 1
        offset += part.nbytes


def test_a_corrupted_tensor_is_detected_and_named(server, monkeypatch):
    _, tensors = tiny_weights(server.kind, seed=3)
    name = "model.layers.1.self_attn.k_proj.weight"
    intact = tensor_route.flatten

    def flatten(parts: Sequence[torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
        flat = intact(parts, buffer)
        _flip_in(tensors[name], parts, flat)
        return flat

    engine = server.attach(colocated=True, bucket_bytes=65536)
    monkeypatch.setattr(tensor_route, "flatten", flatten)
    with pytest.raises(WeightSyncError, match=name) as raised:
        engine.update_weights(WholeWeights(tensors), 7)
    assert "input_layernorm" not in str(raised.value), "a healthy tensor was blamed"
    with pytest.raises(RolloutError, match="weight update to version 7 failed"):
        engine.release_memory()
    engine.close()


def _with_a_wrong_copy(server: RunningServer, folder: str, wrong_rank: int) -> str:
    """What an update says of which the copy on one rank's device goes bad after it was spread."""
    weights = PolicyWeights(loaded_policy(folder, TP2))
    engine = server.attach(colocated=True, max_senders=1, replica_group=dist.group.WORLD)  # so there is one bucket
    intact = tensor_route.handle_of

    def handle_of(flat: torch.Tensor) -> str:
        flat[-1] ^= 1
        return intact(flat)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == wrong_rank:
            patch.setattr(tensor_route, "handle_of", handle_of)
        with pytest.raises(WeightSyncError) as raised:
            engine.update_weights(weights, 1)
    engine.close()
    return str(raised.value)


@pytest.mark.parametrize("wrong_rank", [0, 1])
def test_a_copy_that_is_wrong_on_one_device_is_found(wrong_rank, ranks: RankPools, servers, tmp_path) -> None:
    """The last tensor, the final norm, is whole on both ranks of the server: each has it from its own device."""
    write_tiny_hf_model("qwen3_tied", tmp_path, seed=6)
    first, second = ranks(2).run(_with_a_wrong_copy, servers("qwen3_tied"), str(tmp_path), wrong_rank)
    assert first == second
    assert "wrong parameters: 1\n  model.norm.weight: the server's model.norm.weight differs" in first


class _Failing(PolicyWeights):
    """On one rank, what is put together cannot be had, the second time."""

    wrong_rank = 0
    asked = 0

    def fetch(self, buckets: Any, **options: Any) -> Any:
        self.asked += 1
        if self.asked == 2 and dist.get_rank() == self.wrong_rank:
            raise OSError("the disk is gone")
        yield from super().fetch(buckets, **options)


def _fail(server: RunningServer, folder: str, wrong_rank: int) -> str:
    weights = _Failing(loaded_policy(folder, TP2))
    weights.wrong_rank = wrong_rank
    engine = server.attach(colocated=True, bucket_bytes=16384, replica_group=dist.group.WORLD)
    with pytest.raises(WeightSyncError) as raised:
        engine.update_weights(weights, 1)
    engine.close()
    return str(raised.value)


@pytest.mark.parametrize("wrong_rank", [0, 1])
def test_a_rank_that_fails_ends_the_update_on_all_at_once(wrong_rank, ranks: RankPools, servers, tmp_path) -> None:
    write_tiny_hf_model("qwen3_tied", tmp_path, seed=6)
    messages = ranks(2).run(_fail, servers("qwen3_tied"), str(tmp_path), wrong_rank, timeout=40.0)
    assert all("the disk is gone" in message for message in messages)
    # The server is as another engine can use it.
    ranks(2).run(_update_often, servers("qwen3_tied"), str(tmp_path), TP2, 1)
