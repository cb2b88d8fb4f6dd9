"""Recomputing activations in the backward pass saves memory and changes nothing: gradients are the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dppo.models.hf.weights import export_hf_weights
from megatron_dppo.training.config.recompute import RecomputeConfig
from tests.models.policy_runs import TWO_RANK_LAYOUTS, loaded_policy, packed, put_gradients_in_place_of_weights, rows
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rank_pool import RankPools

RECOMPUTE: dict[str, dict[str, Any]] = {
    name: recompute.transformer_fields()
    for name, recompute in {
        "full": RecomputeConfig("full"),
        "runs of two": RecomputeConfig("full", "uniform", 2),
        "one of two": RecomputeConfig("full", "block", 1),
        "attention": RecomputeConfig("selective"),
        "MLP": RecomputeConfig("selective", modules=["mlp"]),
        "experts": RecomputeConfig("selective", modules=["core_attn", "moe"]),
    }.items()
}


def _gradients(folder: str, layout: dict[str, Any], recompute: dict[str, Any], pack: bool) -> dict[str, torch.Tensor]:
    chunks = loaded_policy(folder, layout, **recompute)
    generator = torch.Generator().manual_seed(6)
    sequences = [torch.randint(0, 250, (length,), generator=generator) for length in (9, 14)]
    # Two micro-batches of one size, as pipelines need them.
    tokens = torch.randint(0, 250, (2, 24), generator=generator)
    inputs = [packed(sequences), packed(sequences[::-1])] if pack else rows(tokens)
    put_gradients_in_place_of_weights(chunks, inputs)
    return {name: tensor.clone() for name, tensor in export_hf_weights(chunks)}


@pytest.mark.parametrize(
    ("kind", "layout", "recompute", "pack"),
    [
        ("qwen3", "one rank", "full", True),
        ("qwen3", "one rank", "runs of two", True),
        ("qwen3", "one rank", "one of two", True),
        ("qwen3", "one rank", "attention", True),
        ("qwen3", "one rank", "MLP", False),
        pytest.param("qwen3_moe", "TP2 EP2", "full", True, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "TP2 EP2", "experts", True, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "TP2 EP2 allgather", "experts", False, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "EP2", "full", False, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "PP2", "one of two", True, marks=pytest.mark.slow),
        pytest.param("qwen3", "CP2", "full", True, marks=pytest.mark.slow),
        pytest.param("qwen3", "CP2", "attention", True, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "PP2 VPP2", "full", True, marks=pytest.mark.slow),
    ],
)
def test_gradients_with_recomputation_are_those_without(
    kind: str, layout: str, recompute: str, pack: bool, ranks: RankPools, tmp_path: Path
) -> None:
    """Recomputation does the same operations on the same numbers, in an order that one thread keeps."""
    folder = write_tiny_hf_model(kind, tmp_path, vocab_size=256, num_hidden_layers=4)
    sizes = {"one rank": {}, **TWO_RANK_LAYOUTS}[layout]
    world_size = 1 if layout == "one rank" else 2
    expected = ranks(world_size).run(_gradients, str(folder), sizes, {}, pack)
    recomputed = ranks(world_size).run(_gradients, str(folder), sizes, RECOMPUTE[recompute], pack)
    for got, without in zip(recomputed, expected, strict=True):
        assert got.keys() == without.keys()
        assert all(bool((gradient != 0).any()) for gradient in got.values())
        for name, gradient in got.items():
            assert torch.equal(gradient, without[name]), name
