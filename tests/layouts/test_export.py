"""Weights leave the trainer whole, whatever its layout and however many ranks send; nobody receives what it does not send."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_dppo.models.hf import export
from megatron_dppo.models.hf.export import Bucket, PolicyWeights
from megatron_dppo.rollout.sglang.weight_route import flatten, num_bytes
from tests.models.policy_runs import loaded_policy
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rank_pool import RankPools

TP2, PP2, EP2 = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"expert_model_parallel_size": 2},
)
ETP2 = {"expert_tensor_parallel_size": 2}
BUCKET_BYTES = 4096


@contextmanager
def received() -> Iterator[dict[str, int]]:
    """Bytes that this rank asked others for."""
    counted = {"bytes": 0}
    original = dist.P2POp

    def count(operation: Any, tensor: torch.Tensor, *args: Any) -> Any:
        counted["bytes"] += tensor.nbytes if operation is dist.irecv else 0
        return original(operation, tensor, *args)

    with mock.patch.object(export.dist, "P2POp", count):
        yield counted


def _fetch(
    folder: str, layout: dict[str, Any], max_senders: int, dtype: torch.dtype
) -> tuple[list[Bucket], dict[str, torch.Tensor], int]:
    """(the plan, what this rank sends, bytes that it received)."""
    weights = PolicyWeights(loaded_policy(folder, layout))
    buckets = weights.buckets(dtype=dtype, bucket_bytes=BUCKET_BYTES, max_senders=max_senders)
    sent: dict[str, torch.Tensor] = {}
    with received() as counted:
        for index, tensors in weights.fetch(buckets, dtype=dtype, wait=lambda work: work.wait()):
            assert buckets[index].sender == dist.get_rank()
            for (name, shape), tensor in zip(buckets[index].tensors, tensors, strict=True):
                assert name not in sent
                assert tensor.shape == shape
                sent[name] = tensor.clone()
    dist.barrier()
    return buckets, sent, counted["bytes"]


def _check(
    kind: str,
    layout: dict[str, Any],
    world_size: int,
    max_senders: int,
    ranks: RankPools,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> list[int]:
    """All tensors arrive, once; returns the senders."""
    write_tiny_hf_model(kind, folder, **config)
    results = ranks(world_size).run(_fetch, str(folder), layout, max_senders, dtype)
    plans = [buckets for buckets, _, _ in results]
    assert all(plan == plans[0] for plan in plans)
    sent = [(name, tensor) for _, tensors, _ in results for name, tensor in tensors.items()]
    assert len(sent) == len(dict(sent))
    stored = load_file(folder / "model.safetensors")
    assert dict(sent).keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name].to(dtype)) for name, tensor in sent)
    for rank, (_, tensors, came) in enumerate(results):
        # Vocabulary rows of padding travel as well, to whoever sends an embedding.
        padded = 6 * math.prod(stored["model.embed_tokens.weight"].shape[1:]) * dtype.itemsize
        tables = sum(name in tensors for name in ("model.embed_tokens.weight", "lm_head.weight"))
        assert came <= sum(tensor.nbytes for tensor in tensors.values()) + tables * padded, f"rank {rank}"
        assert tensors or came == 0
    for bucket in plans[0]:
        size = dtype.itemsize * sum(math.prod(shape) for _, shape in bucket.tensors)
        assert size <= BUCKET_BYTES or len(bucket.parameters) == 1
    senders = sorted({bucket.sender for bucket in plans[0]})
    assert senders == [rank for rank, (_, tensors, _) in enumerate(results) if tensors]
    return senders


@pytest.mark.parametrize(
    ("kind", "layout", "max_senders", "senders"),
    [
        ("qwen3_moe", {}, 4, [0]),
        ("qwen3_moe", TP2 | EP2, 4, [0, 1]),
        ("qwen3_moe", TP2 | EP2, 1, [0]),
        ("qwen3_tied", PP2, 4, [0, 1]),
        ("qwen3_moe", PP2, 1, [0]),
        ("qwen2", TP2, 2, [0, 1]),
        ("llama", {}, 4, [0]),  # DP2: one copy is enough
    ],
)
def test_one_or_two_ranks_send_every_tensor_once(
    kind: str, layout: dict[str, Any], max_senders: int, senders: list[int], ranks: RankPools, tmp_path: Path
) -> None:
    alone = kind == "qwen3_moe" and not layout
    assert _check(kind, layout, 1 if alone else 2, max_senders, ranks, tmp_path) == senders


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "max_senders", "senders"),
    [
        (TP2 | EP2 | PP2, 4, [0, 1, 2, 3]),
        (TP2 | EP2 | PP2, 3, [0, 2]),
        (TP2 | PP2, 2, [0, 2]),
        (TP2 | EP2, 8, [0, 1]),  # of DP 2
        (TP2 | EP2 | ETP2, 4, [0, 1, 2, 3]),
        (EP2 | PP2, 4, [0, 1, 2, 3]),
        (TP2 | EP2 | ETP2, 1, [0]),
    ],
)
def test_up_to_four_ranks_send_every_tensor_once(
    layout: dict[str, Any], max_senders: int, senders: list[int], ranks: RankPools, tmp_path: Path
) -> None:
    assert _check("qwen3_moe", layout, 4, max_senders, ranks, tmp_path) == senders


def test_weights_travel_in_the_type_that_is_served(ranks: RankPools, tmp_path: Path) -> None:
    assert _check("qwen3_moe", TP2 | EP2, 2, 2, ranks, tmp_path, dtype=torch.bfloat16) == [0, 1]


def _peaks_while_sending(folder: str, layout: dict[str, Any], bucket_bytes: int) -> tuple[float, float]:
    """What an update takes of memory here, at its peak, and what this rank sends; in buckets."""
    weights = PolicyWeights(loaded_policy(folder, layout))
    buckets = weights.buckets(dtype=torch.float32, bucket_bytes=bucket_bytes, max_senders=4)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before, sent = _memory("VmRSS"), 0
    on_its_way, free = (torch.empty(bucket_bytes, dtype=torch.uint8) for _ in range(2))  # as BroadcastRoute has them
    for index, tensors in weights.fetch(buckets, dtype=torch.float32, wait=lambda work: work.wait()):
        sent += flatten(tensors, free).nbytes
        on_its_way, free = free, on_its_way
        del tensors
        assert num_bytes(buckets[index], torch.float32) <= bucket_bytes
    peak = _memory("VmHWM") - before
    dist.barrier()
    return peak / bucket_bytes, sent / bucket_bytes


def _memory(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_sending_takes_a_few_buckets_however_large_the_policy(ranks: RankPools, tmp_path: Path) -> None:
    """Two buffers, a bucket that is put together, halves of it and of the next one from the other rank, two for that rank.

    That makes five; putting experts together, and the allocator, take about one more. Each rank sends a dozen.
    """
    wide = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 4, "num_experts": 16}
    write_tiny_hf_model("qwen3_moe", tmp_path, **wide)
    results = ranks(4).run(_peaks_while_sending, str(tmp_path), TP2 | PP2, 4 * 2**20)
    assert all(sent > 10 for _, sent in results)
    assert max(peak for peak, _ in results) < 8
