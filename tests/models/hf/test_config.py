"""Configs: what is read from them, and everything refused before a model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dppo.compat.optional_dependencies import probe_transformer_engine
from megatron_dppo.distributed.layout import ParallelConfig
from megatron_dppo.errors import ConfigError
from megatron_dppo.models.hf.config import (
    architecture,
    check_policy_fits,
    load_hf_config,
    rotary_arguments,
    to_transformer_config,
)
from megatron_dppo.models.kernels import Kernels
from tests.models.tiny_policies import KINDS, tiny_hf_config

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_SIZES = {
    "model_type": "llama",
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json in .*nowhere"):
        load_hf_config(tmp_path / "nowhere")


def test_an_unsupported_model_names_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"'gpt2' is not supported; supported are llama, qwen2, qwen3, qwen3_moe"):
        load_hf_config(tmp_path)


def test_an_inconsistent_config_is_refused() -> None:
    with pytest.raises(ValueError, match="not a valid llama config"):
        tiny_hf_config("llama", num_attention_heads=9)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "sliding-window"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'yarn'"),
        ("llama", {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 5.0}}, "high_freq_factor=5.0"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen3", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
    ],
)
def test_what_would_silently_change_the_numbers_is_refused(kind: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_hf_config(kind, **overrides)


FIELDS = {
    kind: {**tiny_hf_config(kind).to_dict(), "model_type": kind} for kind in ("llama", "qwen2", "qwen3", "qwen3_moe")
}


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *((kind, field) for kind in FIELDS for field in ("vocab_size", "hidden_size", "num_hidden_layers")),
        *((kind, "num_attention_heads") for kind in FIELDS),
        *((kind, "intermediate_size") for kind in ("llama", "qwen2", "qwen3")),
        *((kind, "num_key_value_heads") for kind in ("qwen2", "qwen3", "qwen3_moe")),
        ("qwen3", "head_dim"),
        *(("qwen3_moe", field) for field in ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size")),
    ],
)
def test_a_size_that_is_not_named_is_refused_not_taken_from_the_familys_first_model(kind: str, field: str) -> None:
    fields = {name: value for name, value in FIELDS[kind].items() if name != field}
    with pytest.raises(ConfigError, match=rf"does not name {field.replace('local_', '')}, .*take the config.json"):
        load_hf_config(fields)


def test_a_folder_has_to_say_how_long_a_sequence_may_be(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_SIZES))
    with pytest.raises(ConfigError, match=r"config.json \(llama\) does not name max_position_embeddings"):
        load_hf_config(tmp_path)


def test_what_all_readers_take_for_an_absent_field_is_taken() -> None:
    fields = architecture(load_hf_config(LLAMA_SIZES))
    assert (fields["rope_theta"], fields["rms_norm_eps"], fields["tie_word_embeddings"]) == (10000.0, 1e-6, False)
    assert (fields["num_key_value_heads"], fields["head_dim"]) == (4, 16)
    without = {name: value for name, value in FIELDS["qwen3_moe"].items() if name != "head_dim"}
    assert architecture(load_hf_config(without))["head_dim"] == 16
    del without["norm_topk_prob"]
    assert architecture(load_hf_config(without))["norm_topk_prob"] is False


@pytest.mark.parametrize("kind", FIELDS)
def test_special_tokens_that_are_not_named_are_none(kind: str) -> None:
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    unnamed = load_hf_config({name: value for name, value in FIELDS[kind].items() if name not in special})
    named = load_hf_config({**FIELDS[kind], "bos_token_id": 3, "eos_token_id": [9, 11], "pad_token_id": 0})
    assert [getattr(unnamed, name) for name in special] == [None, None, None]
    assert [getattr(named, name) for name in special] == [3, [9, 11], 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "say the same rope_theta",
        ),
        ({"rope_theta": 1e4, "rope_scaling": LLAMA3_ROPE}, "say the same rope_theta"),
        ({"rope_parameters": LLAMA3_ROPE, "rope_scaling": None}, "rope_scaling=None: make them equal, or remove one"),
        ({"rope_parameters": LLAMA3_ROPE, "rope_scaling": {**LLAMA3_ROPE, "factor": 8.0}}, "make them equal"),
        ({"rope_scaling": {**LLAMA3_ROPE, "type": "linear"}}, "make type and rope_type equal"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: the weights are quantised"),
        ({"compression_config": {"format": "pack-quantized"}}, "compression_config: the weights are compressed"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights: .* call it model.safetensors"),
        ({"per_layer_config": {"0": {"intermediate_size": 32}}}, "layers that differ from each other"),
    ],
)
def test_fields_that_leave_open_which_model_it_is_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_hf_config({**LLAMA_SIZES, **fields})


def test_experts_counted_twice_are_refused_if_the_counts_differ() -> None:
    assert load_hf_config({**FIELDS["qwen3_moe"], "num_experts": 4}).num_experts == 4
    with pytest.raises(ConfigError, match="num_experts=8, but num_local_experts=4: make them equal"):
        load_hf_config({**FIELDS["qwen3_moe"], "num_experts": 8})


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"config.json is not valid JSON \(Expecting"), ("[1]", "holds a list, not an object with fields")],
)
def test_a_config_that_is_no_json_object_is_refused_by_its_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_hf_config(tmp_path)


def test_a_folder_with_an_adapter_is_refused(tmp_path: Path) -> None:
    tiny_hf_config("llama").save_pretrained(tmp_path)
    load_hf_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adapter_config\.json.*merge it into the weights"):
        load_hf_config(tmp_path)


def test_the_fields_that_are_given_stay_as_they_are() -> None:
    rope = {"type": "llama3", **{name: value for name, value in LLAMA3_ROPE.items() if name != "rope_type"}}
    given = {**LLAMA_SIZES, "rope_scaling": rope}
    before = json.dumps(given)
    load_hf_config(given)
    assert json.dumps(given) == before


@pytest.mark.parametrize(
    ("kind", "overrides", "layout", "message"),
    [
        ("llama", {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}, {"tensor_model_parallel_size": 2},
         "num_attention_heads=9 is not divisible by tensor_model_parallel_size=2: choose one of 1, 3, 9"),
        ("llama", {}, {"tensor_model_parallel_size": 4}, "num_key_value_heads=2 .* choose one of 1, 2"),
        ("llama", {"num_hidden_layers": 3}, {"pipeline_model_parallel_size": 2}, "num_hidden_layers=3"),
        ("llama", {"num_hidden_layers": 6},
         {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
         "num_hidden_layers=6 .* virtual_pipeline_model_parallel_size=2.* 6 layers are left for 4 equal parts"),
        ("llama", {"intermediate_size": 95}, {"tensor_model_parallel_size": 2}, "intermediate_size=95"),
        ("llama", {}, {"expert_model_parallel_size": 2}, "has no experts"),
        ("qwen3_moe", {"num_experts": 3}, {"expert_model_parallel_size": 2}, "num_experts=3"),
        ("qwen3_moe", {"moe_intermediate_size": 47}, {"tensor_model_parallel_size": 2}, "moe_intermediate_size=47"),
        ("qwen3_moe", {}, {"tensor_model_parallel_size": 2, "sequence_parallel": False}, "sequence_parallel=False"),
        ("qwen3", {}, {"pipeline_model_parallel_size": 3}, "does not divide the 8 ranks"),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_fit_the_model_is_refused(
    kind: str, overrides: dict[str, Any], layout: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_policy_fits(tiny_hf_config(kind, **overrides), ParallelConfig(**layout), world_size=8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fitting_layout_passes(kind: str) -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    check_policy_fits(tiny_hf_config(kind), layout, world_size=8)


def test_rope_is_read_from_new_and_old_fields() -> None:
    assert rotary_arguments(tiny_hf_config("qwen3"))["rotary_base"] == 10000.0
    old = load_hf_config({**LLAMA_SIZES, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE})
    new = load_hf_config({**LLAMA_SIZES, "rope_parameters": LLAMA3_ROPE})
    expected = {
        "position_embedding_type": "rope",
        "rotary_base": 500000.0,
        "rope_scaling": True,
        "rope_scaling_factor": 32.0,
    }
    assert rotary_arguments(old) == expected
    assert rotary_arguments(new) == expected


def test_transformer_config_of_a_mixture_of_experts() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    config = to_transformer_config(
        tiny_hf_config("qwen3_moe"), layout, torch.bfloat16, Kernels(), recompute_granularity="selective"
    )
    assert config.calculate_per_token_loss
    assert config.bf16
    assert config.params_dtype == config.pipeline_dtype == torch.bfloat16
    assert config.num_moe_experts == 4
    assert config.moe_ffn_hidden_size == 48
    assert config.moe_router_load_balancing_type == "none"
    assert config.moe_aux_loss_coeff == 0.0
    assert config.moe_z_loss_coeff is None
    assert config.moe_expert_capacity_factor is None, "no token is dropped"
    assert config.moe_token_dispatcher_type == "alltoall"
    assert config.moe_router_dtype == "fp32"
    assert config.qk_layernorm
    assert config.sequence_parallel
    assert config.expert_tensor_parallel_size == 1
    assert config.recompute_granularity == "selective", "overrides win"


def test_layout_fields_reach_the_transformer_config() -> None:
    layout = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, moe_token_dispatcher="allgather"
    )
    config = to_transformer_config(tiny_hf_config("qwen3_moe", num_hidden_layers=4), layout, torch.float32, Kernels())
    assert config.virtual_pipeline_model_parallel_size == 2
    assert config.moe_token_dispatcher_type == "allgather"
    one_chunk = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=1)
    config = to_transformer_config(tiny_hf_config("qwen3"), one_chunk, torch.float32, Kernels())
    assert config.virtual_pipeline_model_parallel_size is None, "core takes 1 for an interleaved pipeline"


@pytest.mark.skipif(probe_transformer_engine().usable, reason="with Transformer Engine norms can be recomputed")
def test_recomputing_norms_without_transformer_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'layernorm' needs Transformer Engine .*core_attn, mlp and moe"):
        to_transformer_config(
            tiny_hf_config("qwen3"),
            ParallelConfig(),
            torch.float32,
            Kernels(),
            recompute_granularity="selective",
            recompute_modules=["layernorm"],
        )


def test_qwen2_has_query_key_and_value_biases_only() -> None:
    config = to_transformer_config(tiny_hf_config("qwen2"), ParallelConfig(), torch.float32, Kernels())
    assert config.add_qkv_bias
    assert not config.add_bias_linear
    assert not config.qk_layernorm
