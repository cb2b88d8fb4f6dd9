"""Packed sequences are sequences that happen to share a tensor: same logits, same gradients, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dppo.models.hf.weights import export_hf_weights
from tests.models.policy_runs import (
    GRADIENT_TOLERANCE,
    LOGITS_TOLERANCE,
    TWO_RANK_LAYOUTS,
    full_logits,
    loaded_policy,
    packed,
    put_gradients_in_place_of_weights,
    put_hf_gradients_in_place_of_weights,
)
from tests.models.tiny_policies import tiny_hf_model, write_tiny_hf_model
from tests.rank_pool import RankPools

# Odd lengths and a single token: every layout has to pad somewhere. The longest is not the last.
LENGTHS = (7, 18, 1, 11)
# Core's cross entropy knows no padded vocabulary: none here. Two ranks of 128 rows are 256. Pipelines need four layers.
SHAPE = {"vocab_size": 256, "num_hidden_layers": 4}
FOUR_RANK_LAYOUTS: dict[str, dict[str, Any]] = {
    "CP2 TP2": {"context_parallel_size": 2, "tensor_model_parallel_size": 2},
    "CP2 TP2 EP2": {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "CP2 PP2 VPP2": {
        "context_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
    "CP4": {"context_parallel_size": 4},
    "TP2 EP2 ETP2": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
    },
    "TP2 EP2 ETP2 allgather": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
        "moe_token_dispatcher": "allgather",
    },
}
CASES = [
    ("qwen3", "one rank"),
    ("qwen3", "TP2"),
    ("qwen3", "CP2"),
    pytest.param("qwen3_tied", "PP2 VPP2", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "TP2 EP2", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "TP2 EP2 allgather", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "TP2 EP2 ETP2", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "TP2 EP2 ETP2 allgather", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "CP2", marks=pytest.mark.slow),
    pytest.param("qwen3", "CP2 TP2", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "CP2 TP2 EP2", marks=pytest.mark.slow),
    pytest.param("qwen3", "CP2 PP2 VPP2", marks=pytest.mark.slow),
    pytest.param("qwen3", "CP4", marks=pytest.mark.slow),
]


def example_sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 250, (length,), generator=generator) for length in LENGTHS]


def _logits_and_gradients(folder: str, layout: dict[str, Any]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logits of each packed micro-batch, and the gradients of all weights.

    Padding is of a token like any other, which experts compute too: it must not change what the others get.
    """
    chunks = loaded_policy(folder, layout)
    sequences = example_sequences()
    # Two micro-batches of one size, as pipelines need them, with the sequences at different places.
    inputs = [packed(sequences), packed(sequences[::-1])]
    logits = full_logits(chunks, inputs)
    put_gradients_in_place_of_weights(chunks, inputs)
    return logits, {name: tensor.clone() for name, tensor in export_hf_weights(chunks)}


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_packed_sequences_have_the_logits_and_gradients_of_each_alone(
    kind: str, layout: str, ranks: RankPools, tmp_path: Path
) -> None:
    write_tiny_hf_model(kind, tmp_path / "weights", **SHAPE)
    sizes = {"one rank": {}, **TWO_RANK_LAYOUTS, **FOUR_RANK_LAYOUTS}[layout]
    world_size = 1 if layout == "one rank" else 4 if layout in FOUR_RANK_LAYOUTS else 2
    results = ranks(world_size).run(_logits_and_gradients, str(tmp_path / "weights"), sizes)

    reference, sequences = tiny_hf_model(kind, **SHAPE), example_sequences()
    with torch.no_grad():
        alone = [reference(sequence[None]).logits[0] for sequence in sequences]
    compared = [_compare_logits(logits, alone, sizes.get("context_parallel_size", 1)) for logits, _ in results]
    assert any(compared)

    put_hf_gradients_in_place_of_weights(reference, sequences)
    reference.save_pretrained(tmp_path / "gradients")
    expected = load_file(tmp_path / "gradients" / "model.safetensors")
    for _, gradients in results:
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            tolerance = GRADIENT_TOLERANCE * expected[name].abs().max().item()
            torch.testing.assert_close(
                gradient, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def _compare_logits(packs: list[torch.Tensor], alone: list[torch.Tensor], context_parallel_size: int) -> int:
    """Compare the logits of each sequence; returns how many were compared (none on pipeline stages but the last)."""
    multiple = 2 * context_parallel_size if context_parallel_size > 1 else 1
    compared = 0
    for logits, order in zip(packs, (alone, alone[::-1]), strict=False):
        start = 0
        for expected in order:
            length = len(expected)
            tolerance = LOGITS_TOLERANCE * expected.abs().max().item()
            torch.testing.assert_close(logits[start : start + length], expected, rtol=0, atol=tolerance)
            start += -(-length // multiple) * multiple
            compared += 1
    return compared
