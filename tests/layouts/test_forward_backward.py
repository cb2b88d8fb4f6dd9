"""A layout changes where numbers are, not what they are: random weights, gradients, replica groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_dppo.distributed.layout import (
    ParallelConfig,
    initialize_model_parallel,
    replica_group,
)
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.models.hf.weights import export_hf_weights
from tests.models.policy_runs import (
    GRADIENT_TOLERANCE,
    TWO_RANK_LAYOUTS,
    example_tokens,
    loaded_policy,
    put_gradients_in_place_of_weights,
    put_hf_gradients_in_place_of_weights,
    rows,
)
from tests.models.tiny_policies import tiny_hf_config, tiny_hf_model, write_tiny_hf_model
from tests.rank_pool import RankPools


def _random_weights(kind: str, layout: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    parallel = ParallelConfig(**layout)
    initialize_model_parallel(parallel, seed=1)
    chunks = build_policy(tiny_hf_config(kind, num_hidden_layers=4), parallel, torch.float32)
    initialize_randomly(chunks, seed)
    return {name: tensor.clone() for name, tensor in export_hf_weights(chunks)}


@pytest.mark.parametrize(
    ("kind", "layout"), [("qwen3_moe", "TP2 EP2"), ("qwen3_moe", "TP2"), ("llama_tied", "PP2 VPP2")]
)
def test_random_initialisation_is_the_same_model_in_every_layout(kind: str, layout: str, ranks: RankPools) -> None:
    expected = ranks(1).run(_random_weights, kind, {}, 5)[0]
    for weights in ranks(2).run(_random_weights, kind, TWO_RANK_LAYOUTS[layout], 5):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_random_initialisation_depends_on_seed_and_parameter(ranks: RankPools) -> None:
    first = ranks(1).run(_random_weights, "qwen2", {}, 5)[0]
    second = ranks(1).run(_random_weights, "qwen2", {}, 6)[0]
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    assert not torch.equal(first[gate], second[gate])
    assert not torch.equal(first[gate], first[up])
    assert not torch.equal(first[gate], first[gate.replace("layers.0", "layers.1")])
    assert (first["model.norm.weight"] == 1).all()
    assert (first["model.layers.0.self_attn.q_proj.bias"] == 0).all()
    # 6144 draws: the standard deviation of their standard deviation is 0.02 / sqrt(2 * 6144), and 5 of those are 4.5 %.
    assert first[gate].std().item() == pytest.approx(0.02, rel=0.045)


def _gradients(folder: str, layout: dict[str, Any]) -> dict[str, torch.Tensor]:
    chunks = loaded_policy(folder, layout)
    put_gradients_in_place_of_weights(chunks, rows(example_tokens()))
    return {name: tensor.clone() for name, tensor in export_hf_weights(chunks)}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("qwen3", "TP2"),
        ("qwen3_moe", "TP2 EP2"),
        pytest.param("qwen3_tied", "PP2", marks=pytest.mark.slow),
        pytest.param("llama_tied", "PP2 VPP2", marks=pytest.mark.slow),
        pytest.param("qwen3", "CP2", marks=pytest.mark.slow),
        pytest.param("qwen3", "TP2 without sequence parallelism", marks=pytest.mark.slow),
        pytest.param("qwen2", "TP2", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "EP2", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "TP2", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "TP2 EP2 allgather", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "EP2 allgather", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "TP2 allgather", marks=pytest.mark.slow),  # experts split over TP
        pytest.param("llama", "DP2", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_the_hugging_face_model(
    kind: str, layout: str, ranks: RankPools, tmp_path: Path
) -> None:
    """Norms under sequence parallelism, query and key norms, tied embeddings and experts each need a reduction."""
    # Core's cross entropy knows no padded vocabulary: none here. Two ranks of 128 rows are 256.
    shape = {"vocab_size": 256, "num_hidden_layers": 4 if "VPP2" in layout else 2}
    source = write_tiny_hf_model(kind, tmp_path / "weights", **shape)
    results = ranks(2).run(_gradients, str(source), TWO_RANK_LAYOUTS[layout])
    reference = tiny_hf_model(kind, **shape)
    put_hf_gradients_in_place_of_weights(reference, example_tokens())
    reference.save_pretrained(tmp_path / "gradients")
    expected = load_file(tmp_path / "gradients" / "model.safetensors")
    for gradients in results:
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            tolerance = GRADIENT_TOLERANCE * expected[name].abs().max().item()
            torch.testing.assert_close(
                gradient, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def _replica(layout: dict[str, Any]) -> list[int]:
    initialize_model_parallel(ParallelConfig(**layout), seed=1)
    return dist.get_process_group_ranks(replica_group())


def test_a_replica_is_every_rank_that_holds_part_of_one_copy(ranks: RankPools) -> None:
    for layout in (
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
        {"context_parallel_size": 2},
    ):
        assert ranks(2).run(_replica, layout) == [[0, 1], [0, 1]]
    assert ranks(2).run(_replica, {}) == [[0], [1]]


@pytest.mark.slow
def test_replicas_of_several_kinds_of_parallelism(ranks: RankPools) -> None:
    pipeline_and_data = ranks(4).run(_replica, {"pipeline_model_parallel_size": 2})
    # Pipeline stages are the outermost dimension of Megatron's rank order.
    assert pipeline_and_data == [[0, 2], [1, 3], [0, 2], [1, 3]]
    whole = ranks(4).run(_replica, {"tensor_model_parallel_size": 2, "context_parallel_size": 2})
    assert whole == [[0, 1, 2, 3]] * 4


def _initialisation_error(layout: dict[str, Any]) -> str:
    try:
        initialize_model_parallel(ParallelConfig(**layout), seed=1)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_layout_that_does_not_fit_the_world_is_refused(ranks: RankPools) -> None:
    for message in ranks(2).run(_initialisation_error, {"tensor_model_parallel_size": 4}):
        assert "tensor 4 x pipeline 1 x context 1 = 4 does not divide the 2 ranks" in message
    for message in ranks(2).run(_initialisation_error, {"expert_model_parallel_size": 3}):
        assert "expert 3" in message
