"""An exported config.json means the same model to readers of the old field names and of the new ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_dppo.models.hf.config import architecture, load_hf_config
from megatron_dppo.models.hf.config_json import fields_for_every_reader
from tests.models.tiny_policies import tiny_hf_config

_LLAMA3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
# As they are published, written by transformers 4: the fields that matter, in small.
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "vocab_size": 250,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": {
        **_SIZES,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128,
        "eos_token_id": [201, 208, 209],
        "head_dim": 16,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**_LLAMA3_SCALING, "rope_type": "llama3"},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "llama with type": {
        **_SIZES,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**_LLAMA3_SCALING, "type": "llama3"},
        "rope_theta": 500000.0,
    },
    "qwen2": {
        **_SIZES,
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 243,
        "eos_token_id": 245,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "use_mrope": False,  # unknown to transformers
    },
    "qwen3_moe": {
        **_SIZES,
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "eos_token_id": 245,
        "head_dim": 16,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "temperature": 0.6,  # transformers 5 leaves generation parameters out
        "repetition_penalty": 1.1,
        "our_own": {"made": ["by", "us"]},
    },
}


def rotary_embedding_of_old_readers(fields: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) as transformers 4 takes them from a config.json, for all of these families alike."""
    scaling = fields.get("rope_scaling")
    if scaling is not None and "type" in scaling:
        scaling = {**scaling, "rope_type": scaling["type"]}
    return fields.get("rope_theta", 10000.0), scaling


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_field_that_came_in_comes_out(name: str) -> None:
    exported = fields_for_every_reader(load_hf_config(PUBLISHED[name]), "float32")
    expected = {**PUBLISHED[name], "torch_dtype": "float32", "dtype": "float32"}
    if "type" in (expected.get("rope_scaling") or {}):
        expected["rope_scaling"] = {**expected["rope_scaling"], "rope_type": "llama3"}
    assert {field: exported[field] for field in expected} == expected
    assert exported["architectures"] == [type(load_hf_config(PUBLISHED[name])).__name__[:-6] + "ForCausalLM"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_old_and_new_readers_take_the_same_numbers(name: str, tmp_path: Path) -> None:
    original = PUBLISHED[name]
    exported = fields_for_every_reader(load_hf_config(original), "bfloat16")
    old, new = rotary_embedding_of_old_readers(exported), rotary_embedding_of_old_readers(original)
    assert old == new
    (tmp_path / "config.json").write_text(json.dumps(exported))
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters["rope_theta"] == original["rope_theta"]
    assert read.rope_parameters["rope_type"] == ("llama3" if original.get("rope_scaling") else "default")
    assert read.rope_parameters.get("factor") == (original.get("rope_scaling") or {}).get("factor")
    assert architecture(load_hf_config(tmp_path)) == architecture(load_hf_config(original))


def test_a_config_that_only_has_new_names_gets_the_old_ones() -> None:
    rope = {**_LLAMA3_SCALING, "rope_type": "llama3", "rope_theta": 5e5}
    exported = fields_for_every_reader(tiny_hf_config("llama", rope_parameters=rope), "float32")
    assert rotary_embedding_of_old_readers(exported) == (5e5, {**_LLAMA3_SCALING, "rope_type": "llama3"})
    assert fields_for_every_reader(tiny_hf_config("qwen3_moe"), "float32")["num_experts"] == 4


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_was_exported_is_exported_again_unchanged(name: str) -> None:
    once = fields_for_every_reader(load_hf_config(PUBLISHED[name]), "bfloat16")
    assert fields_for_every_reader(load_hf_config(once), "bfloat16") == once


def test_no_default_of_a_familys_first_model_is_exported_as_a_fact() -> None:
    exported = fields_for_every_reader(load_hf_config(PUBLISHED["llama with type"]), "float32")
    assert [exported[f"{token}_token_id"] for token in ("bos", "eos", "pad")] == [None, None, None]
