"""Several ranks of a trainer send its weights, and what is wrong on any of them is found and named."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dppo.errors import WeightSyncError
from megatron_dppo.models.hf.export import PolicyWeights
from megatron_dppo.rollout.sample import SamplingParams
from megatron_dppo.rollout.sglang import broadcast_route
from megatron_dppo.rollout.sglang.update_calls import UpdateCalls
from tests.models.policy_runs import loaded_policy
from tests.models.tiny_policies import tiny_hf_model, write_tiny_hf_model
from tests.rank_pool import RankPools
from tests.rollout.engine_contract import EngineUnderTest, assert_log_probs_match, make_prompts
from tests.rollout.sglang.conftest import RunningServer

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

TP2, PP2, EP2 = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"expert_model_parallel_size": 2},
)
LAYOUTS = {"TP2 EP2": TP2 | EP2, "PP2": PP2, "TP2 PP2": TP2 | PP2}
BUCKET_BYTES = 16384

Corrupt = Callable[[torch.Tensor, Sequence[torch.Tensor]], None]


def _flip_a_bit(flat: torch.Tensor, _parts: Sequence[torch.Tensor]) -> None:
    flat[len(flat) // 2] ^= 1


def _swap(flat: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """The first two neighbours of one size change places."""
    start = 0
    for part, following in pairwise(parts):
        if part.nbytes == following.nbytes and not torch.equal(part, following):
            end = start + 2 * part.nbytes
            flat[start:end] = flat[start:end].roll(part.nbytes)
            return
        start += part.nbytes
    flat.zero_()  # there are none


def _forget(flat: torch.Tensor, _parts: Sequence[torch.Tensor]) -> None:
    """What was sent before, or nothing yet, instead of the newest."""
    flat.zero_()


def _update(server: RunningServer, folder: str, layout: dict[str, Any], updates: int) -> tuple[list[int], list[Any]]:
    weights = PolicyWeights(loaded_policy(folder, layout))
    engine = server.attach(bucket_bytes=BUCKET_BYTES, max_senders=4, replica_group=dist.group.WORLD)
    for version in range(1, updates + 1):
        engine.update_weights(weights, version)
    assert engine._sync is not None
    senders = list(engine._sync._route._senders)
    samples = engine.generate(make_prompts(250, [5, 9]), SamplingParams(max_new_tokens=6, samples_per_prompt=2))
    dist.barrier()
    engine.close()
    return senders, samples


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_policy_of_four_ranks_is_served(layout: str, ranks: RankPools, servers, tmp_path) -> None:
    server = servers("qwen3_moe")
    write_tiny_hf_model("qwen3_moe", tmp_path, seed=5)
    results = ranks(4).run(_update, server, str(tmp_path), LAYOUTS[layout], 3)
    (senders, samples), *others = results
    assert len(senders) == (2 if layout == "PP2" else {"TP2 EP2": 2, "TP2 PP2": 4}[layout])
    assert all(of_rank == (senders, []) for of_rank in others)
    subject = EngineUnderTest(None, tiny_hf_model("qwen3_moe", 5), lambda *_: None)
    assert_log_probs_match(subject, samples, 1.0)


def _update_wrongly(
    server: RunningServer, folder: str, layout: dict[str, Any], wrong_rank: int, corrupt: Corrupt
) -> tuple[str, list[str]]:
    """(what the update says, the tensors that ``wrong_rank`` sends)."""
    weights = PolicyWeights(loaded_policy(folder, layout))
    engine = server.attach(bucket_bytes=BUCKET_BYTES, max_senders=4, replica_group=dist.group.WORLD)
    intact = broadcast_route.flatten

    def flatten(parts: Sequence[torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
        flat = intact(parts, buffer)
        corrupt(flat, parts)
        return flat

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == wrong_rank:
            patch.setattr(broadcast_route, "flatten", flatten)
        with pytest.raises(WeightSyncError) as raised:
            engine.update_weights(weights, 1)
    buckets = weights.buckets(dtype=torch.float32, bucket_bytes=BUCKET_BYTES, max_senders=4)
    sent = [name for bucket in buckets if bucket.sender == wrong_rank for name, _ in bucket.tensors]
    engine.close()
    return str(raised.value), sent


@pytest.mark.parametrize(
    ("wrong_rank", "corrupt"), [(0, _swap), (1, _flip_a_bit), (2, _forget), (3, _swap), (3, _flip_a_bit)]
)
def test_what_any_sender_sends_wrongly_is_named(
    wrong_rank: int, corrupt: Corrupt, ranks: RankPools, servers, tmp_path
) -> None:
    write_tiny_hf_model("qwen3_moe", tmp_path, seed=6)
    results = ranks(4).run(
        _update_wrongly, servers("qwen3_moe"), str(tmp_path), LAYOUTS["TP2 PP2"], wrong_rank, corrupt
    )
    messages, sent = {message for message, _ in results}, results[0][1]
    assert len(messages) == 1
    message = messages.pop()
    assert "differs from what was exported" in message
    named = [line for line in message.splitlines() if line.startswith("  ")]
    assert named
    for line in named:  # tensors, up to four of which are listed one by one, and the parameter that they are in
        tensors = line.partition(":")[0].removesuffix(")").replace(" ... ", ", ").strip().split(", ")
        assert all(tensor.partition(" (")[0] in sent for tensor in tensors), line


class _Failing(PolicyWeights):
    """On one rank, what is put together cannot be had."""

    wrong_rank = 0

    def fetch(self, buckets: Any, **options: Any) -> Any:
        for number, entry in enumerate(super().fetch(buckets, **options)):
            if number == 1 and dist.get_rank() == self.wrong_rank:
                raise OSError("the disk is gone")
            yield entry


def _fail(server: RunningServer, folder: str, wrong_rank: int) -> tuple[str, int, int]:
    """(what the update says, buckets that were taken, those of them that the server has loaded)."""
    weights = _Failing(loaded_policy(folder, LAYOUTS["TP2 PP2"]))
    weights.wrong_rank = wrong_rank
    engine = server.attach(bucket_bytes=BUCKET_BYTES, max_senders=4, replica_group=dist.group.WORLD)
    load, taken, loaded = UpdateCalls.load, [], []

    async def load_later(calls: UpdateCalls, bucket: Any, *args: Any) -> None:
        taken.append(bucket)
        await asyncio.sleep(0.1)  # by then a sender has failed
        await load(calls, bucket, *args)
        loaded.append(bucket)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UpdateCalls, "load", load_later)
        with pytest.raises(WeightSyncError) as raised:
            engine.update_weights(weights, 1)
        engine.close()
    return str(raised.value), len(taken), len(loaded)


@pytest.mark.parametrize("wrong_rank", [0, 3])
def test_a_sender_that_fails_ends_the_update_on_all_ranks_at_once(
    wrong_rank: int, ranks: RankPools, servers, tmp_path
) -> None:
    write_tiny_hf_model("qwen3_moe", tmp_path, seed=6)
    results = ranks(4).run(_fail, servers("qwen3_moe"), str(tmp_path), wrong_rank, timeout=40.0)
    assert all("the disk is gone" in message for message, *_ in results)
    _, taken, loaded = results[0]
    # A sender whose bucket was taken sends it, and would wait for a server that knows nothing of it.
    assert loaded == taken > 0
    # The servers are as another engine can use them.
    ranks(4).run(_update, servers("qwen3_moe"), str(tmp_path), LAYOUTS["TP2 PP2"], 1)
