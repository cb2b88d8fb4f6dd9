"""``model.overrides``: a short list of core's own names, and for every other where it is decided."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.model_overrides import ALLOWED, checked_overrides

FIELDS = {field.name for field in dataclasses.fields(TransformerConfig)}


def test_core_has_every_field_of_the_list() -> None:
    """Run with both ends of the supported range (tools/setup/megatron_core_environment.sh)."""
    assert set(ALLOWED) <= FIELDS


def test_what_is_allowed_comes_back_as_core_takes_it() -> None:
    overrides = {"attention_backend": "flash", "moe_deepep_num_sms": 24, "moe_permute_fusion": False}
    checked = checked_overrides(overrides, uses_transformer_engine=True, is_moe=True)
    assert checked == {**overrides, "attention_backend": AttnBackend.flash}
    assert checked_overrides({"apply_rope_fusion": False}, uses_transformer_engine=False, is_moe=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fp8": "e4m3"}, "fp8 cannot be set: .*cannot be filled, exported"),
        ({"fp8_param": True}, "fp8 and fp4 parameters"),
        ({"fp4": "e2m1"}, "fp8 and fp4 parameters"),
        ({"moe_single_grouped_weight": True}, "no place in the checkpoint's names"),
        ({"recompute_granularity": "full"}, "set model.recompute"),
        ({"tensor_model_parallel_size": 2}, "set parallel"),
        ({"hidden_size": 8}, "config.json of model.path"),
        ({"calculate_per_token_loss": False}, "divided once"),
        ({"hidden_dropout": 0.1}, "different log-probs"),
        ({"gradient_accumulation_fusion": True}, "model.backend decides"),
        ({"cuda_graph_impl": "local"}, "differ in shape"),
        ({"moe_aux_loss_coeff": 0.1}, "auxiliary loss"),
        ({"init_method_std": 0.1}, "it is not one of apply_rope_fusion, attention_backend"),
        ({"no_such_field": 1}, "it is not one of apply_rope_fusion"),
        ({"moe_deepep_num_sms": "24"}, "must be int, not '24'"),
        ({"bias_dropout_fusion": 1}, "must be bool, not 1"),
        ({"attention_backend": "fast"}, r"must be auto \| flash \| fused \| unfused, not 'fast'"),
    ],
)
def test_everything_else_is_refused_with_where_it_is_decided(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_overrides(overrides, uses_transformer_engine=True, is_moe=True)


def test_an_override_that_nothing_here_would_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"attention_backend=flash is read by Transformer Engine's layers only"):
        checked_overrides({"attention_backend": "flash"}, uses_transformer_engine=False, is_moe=True)
    with pytest.raises(ConfigError, match="read by MoE layers only"):
        checked_overrides({"moe_router_fusion": True}, uses_transformer_engine=True, is_moe=False)


def test_a_core_without_the_field_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "megatron_dppo.training.config.model_overrides.TransformerConfig", dataclasses.make_dataclass("Older", [])
    )
    with pytest.raises(ConfigError, match=r"megatron-core [\d.]+.* has no such field"):
        checked_overrides({"bias_dropout_fusion": True}, uses_transformer_engine=True, is_moe=True)
