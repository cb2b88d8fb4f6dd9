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
    check_policy_fits,
    decisive_fields,
    load_hf_config,
    rotary_arguments,
    to_transformer_config,
)
from megatron_dppo.models.hf.config_json import config_json
from megatron_dppo.models.hf.names import hf_shapes, parameter_names
from tests.models.tiny_policies import KINDS, tiny_hf_config

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


SIZES = {
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
OLD_LLAMA = {"model_type": "llama", **SIZES}


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


@pytest.mark.parametrize(
    ("kind", "overrides", "layout", "message"),
    [
        ("llama", {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}, {"tensor_model_parallel_size": 2},
         "num_attention_heads=9 is not divisible by tensor_model_parallel_size=2: choose one of 1, 3, 9"),
        ("llama", {}, {"tensor_model_parallel_size": 4}, "num_key_value_heads=2 .* choose one of 1, 2"),
        ("llama", {"num_hidden_layers": 3}, {"pipeline_model_parallel_size": 2}, "num_hidden_layers=3"),
        ("llama", {"num_hidden_layers": 6},
         {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
         "num_hidden_layers=6 is not divisible by .* x virtual_pipeline_model_parallel_size=2 = 4"),
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
    old = load_hf_config({**OLD_LLAMA, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE})
    new = load_hf_config({**OLD_LLAMA, "rope_parameters": LLAMA3_ROPE})
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
        tiny_hf_config("qwen3_moe"), layout, torch.bfloat16, recompute_granularity="selective"
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
    config = to_transformer_config(tiny_hf_config("qwen3_moe", num_hidden_layers=4), layout, torch.float32)
    assert config.virtual_pipeline_model_parallel_size == 2
    assert config.moe_token_dispatcher_type == "allgather"
    one_chunk = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=1)
    config = to_transformer_config(tiny_hf_config("qwen3"), one_chunk, torch.float32)
    assert config.virtual_pipeline_model_parallel_size is None, "core takes 1 for an interleaved pipeline"


@pytest.mark.skipif(probe_transformer_engine().usable, reason="with Transformer Engine norms can be recomputed")
def test_recomputing_norms_without_transformer_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'layernorm' needs Transformer Engine .*core_attn, mlp and moe"):
        to_transformer_config(
            tiny_hf_config("qwen3"),
            ParallelConfig(),
            torch.float32,
            recompute_granularity="selective",
            recompute_modules=["layernorm"],
        )


def test_qwen2_has_query_key_and_value_biases_only() -> None:
    config = to_transformer_config(tiny_hf_config("qwen2"), ParallelConfig(), torch.float32)
    assert config.add_qkv_bias
    assert not config.add_bias_linear
    assert not config.qk_layernorm


# config.json as it was written for transformers 4: what its readers look for, and what must come out of an export again.
OLD_GENERATION = {
    "default rope": {"rope_theta": 500000.0, "rope_scaling": None},
    "no scaling named": {"rope_theta": 1000000.0},
    "llama 3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


@pytest.mark.parametrize("rope", OLD_GENERATION)
def test_an_exported_config_says_the_same_to_readers_of_both_generations(rope: str) -> None:
    fields = {**OLD_LLAMA, **OLD_GENERATION[rope], "torch_dtype": "float32", "tie_word_embeddings": True}
    hf_config = load_hf_config(fields)
    written = config_json(hf_config, torch.bfloat16, "LlamaForCausalLM")
    # transformers 4: `kwargs.get("rope_theta", 10000.0)`, and no scaling where there is none.
    assert written["rope_theta"] == fields["rope_theta"]
    assert written["rope_scaling"] == fields.get("rope_scaling")
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert written["tie_word_embeddings"] is True
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert decisive_fields(load_hf_config(written)) == decisive_fields(hf_config)
    old_fields_alone = {name: value for name, value in written.items() if name not in ("rope_parameters", "dtype")}
    assert decisive_fields(load_hf_config(old_fields_alone)) == decisive_fields(hf_config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_of_every_kind_survives_the_export(kind: str) -> None:
    hf_config = tiny_hf_config(kind, eos_token_id=[9, 11], bos_token_id=3)
    again = load_hf_config(json.loads(json.dumps(config_json(hf_config, torch.float32, "ForCausalLM"))))
    assert decisive_fields(again) == decisive_fields(hf_config)
    assert (again.eos_token_id, again.bos_token_id) == ([9, 11], 3)


def test_a_mixture_of_experts_has_its_experts_under_both_names() -> None:
    written = config_json(tiny_hf_config("qwen3_moe"), torch.float32, "Qwen3MoeForCausalLM")
    assert written["num_experts"] == 4
    assert written["num_local_experts"] == 4


def test_fields_that_transformers_does_not_know_stay_in_the_export() -> None:
    written = config_json(load_hf_config({**OLD_LLAMA, "our_note": {"a": [1]}}), torch.float32, "LlamaForCausalLM")
    assert written["our_note"] == {"a": [1]}


class _Recorded:
    """A config that notes what is read of it."""

    def __init__(self, hf_config: Any) -> None:
        self.hf_config, self.read = hf_config, set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.hf_config, name)


# Read, and refused beforehand unless it is as here; or without a bearing on what a trained policy computes.
REFUSED_OTHERWISE = {"attention_dropout"}
WITHOUT_BEARING = {"initializer_range"}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_the_builder_reads_decides_whether_two_policies_are_of_one_model(kind: str) -> None:
    recorded = _Recorded(tiny_hf_config(kind))
    to_transformer_config(recorded, ParallelConfig(), torch.float32)  # type: ignore[arg-type]
    rotary_arguments(recorded)  # type: ignore[arg-type]
    for name in parameter_names(recorded):  # type: ignore[arg-type]
        hf_shapes(name, recorded)  # type: ignore[arg-type]
    by_other_names = {"rope_parameters", "rope_scaling", "rope_theta"}
    missing = recorded.read - decisive_fields(recorded.hf_config).keys() - by_other_names
    assert missing <= REFUSED_OTHERWISE | WITHOUT_BEARING


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("qwen3", {"rms_norm_eps": 1e-5}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"num_experts_per_tok": 3}),
    ],
)
def test_a_field_that_changes_numbers_and_no_shape_makes_another_model(kind: str, change: dict[str, Any]) -> None:
    assert decisive_fields(tiny_hf_config(kind, **change)) != decisive_fields(tiny_hf_config(kind))


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        *(({"model_type": "llama", **SIZES}, name) for name in SIZES if name != "num_key_value_heads"),
        *(({"model_type": "qwen3", **SIZES}, name) for name in ("num_key_value_heads", "vocab_size")),
        *(({"model_type": "qwen3_moe", **SIZES, **EXPERTS}, name) for name in EXPERTS),
    ],
)
@pytest.mark.parametrize("absent", [True, False], ids=["absent", "null"])
def test_a_size_that_the_config_does_not_name_is_not_made_up(
    fields: dict[str, Any], missing: str, absent: bool
) -> None:
    """transformers would take that of the first model of the family: 32 layers, a vocabulary of 32000, ..."""
    load_hf_config(fields)
    fields = {name: value for name, value in fields.items() if name != missing} | ({} if absent else {missing: None})
    with pytest.raises(ConfigError, match=f"does not say {missing}"):
        load_hf_config(fields)


def test_quantised_weights_are_refused_before_they_are_read() -> None:
    with pytest.raises(ConfigError, match="quantization_config"):
        load_hf_config({**OLD_LLAMA, "quantization_config": {"quant_method": "fp8"}})


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_config_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json (cannot be read as JSON|holds a list)"):
        load_hf_config(tmp_path)
