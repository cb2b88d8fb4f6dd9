"""The name map covers a checkpoint exactly, and joining is the inverse of splitting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dppo.models.hf.names import from_hf, hf_names, hf_shapes, parameter_names, to_hf
from megatron_dppo.models.sharding import cut_shard, join_shards
from tests.models.tiny_policies import KINDS, tiny_hf_config, write_tiny_hf_model


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_a_saved_checkpoint(kind: str, tmp_path: Path) -> None:
    stored = load_file(write_tiny_hf_model(kind, tmp_path) / "model.safetensors")
    config = tiny_hf_config(kind)
    shapes = {
        hf: shape
        for name in parameter_names(config)
        for hf, shape in zip(hf_names(name), hf_shapes(name, config), strict=True)
    }
    assert shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_splitting_a_joined_parameter_gives_back_its_tensors(kind: str) -> None:
    config = tiny_hf_config(kind)
    for name in parameter_names(config):
        tensors = [torch.randn(shape) for shape in hf_shapes(name, config)]
        for (hf, back), expected_name, expected in zip(
            to_hf(name, from_hf(name, tensors, config), config), hf_names(name), tensors, strict=True
        ):
            assert hf == expected_name
            assert back.is_contiguous()
            assert torch.equal(back, expected), hf


def test_query_heads_stay_with_their_key_and_value_head() -> None:
    """4 query heads, 2 KV heads of size 16: q0 q1 k0 v0 q2 q3 k1 v1, so that a TP rank gets whole groups."""
    config = tiny_hf_config("llama")
    query, key, value = (
        torch.full(shape, base) for shape, base in zip([(64, 64), (32, 64), (32, 64)], (0.0, 10.0, 20.0), strict=True)
    )
    for tensor in (query, key, value):
        tensor += torch.arange(tensor.shape[0] // 16).repeat_interleave(16)[:, None]
    joined = from_hf("decoder.layers.0.self_attention.linear_qkv.weight", [query, key, value], config)
    assert joined[::16, 0].tolist() == [0.0, 1.0, 10.0, 20.0, 2.0, 3.0, 11.0, 21.0]


def test_a_tensor_parallel_rank_gets_matching_gate_and_up_rows() -> None:
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    whole = torch.arange(8.0)[:, None]  # gate rows 0-3, up rows 4-7
    shards = [cut_shard(name, whole, 2, rank) for rank in range(2)]
    assert [shard[:, 0].tolist() for shard in shards] == [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
    assert torch.equal(join_shards(name, shards), whole)


def test_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"decoder\.layers\.0\.self_attention\.surprise has no counterpart"):
        hf_names("decoder.layers.0.self_attention.surprise")
