"""``model.recompute``: what it tells core, and what is refused because core would refuse it later or do nothing."""

from __future__ import annotations

import re

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.recompute import RecomputeConfig


@pytest.mark.parametrize(
    ("recompute", "fields"),
    [
        (RecomputeConfig(), {}),
        (RecomputeConfig("full"), ("full", "uniform", 1)),
        (RecomputeConfig("full", "block", 3), ("full", "block", 3)),
        (
            RecomputeConfig("selective", modules=["moe", "core_attn"]),
            {"recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]},
        ),
    ],
)
def test_what_core_is_told(recompute: RecomputeConfig, fields: dict | tuple) -> None:
    recompute.check([4, 4], is_moe=True)
    if isinstance(fields, tuple):
        names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
        fields = dict(zip(names, fields, strict=True))
    assert recompute.transformer_fields() == fields


@pytest.mark.parametrize(
    ("recompute", "is_moe", "message"),
    [
        (RecomputeConfig("partial"), False, "granularity must be one of none, selective, full, not 'partial'"),
        (RecomputeConfig("full", "some"), False, "method must be one of uniform, block"),
        (RecomputeConfig("full", "block", 5), False, "num_layers=5 must be from 1 to 4"),
        (RecomputeConfig("selective", modules=[]), False, "modules is empty"),
        (
            RecomputeConfig("selective", modules=["attention"]),
            False,
            "core_attn, mlp, moe, moe_act, layernorm",
        ),
        (RecomputeConfig("selective", modules=["mlp"]), True, "mlp: an MoE policy has no dense MLP"),
        (RecomputeConfig("selective", modules=["moe"]), False, "moe: a dense policy has no experts"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(recompute: RecomputeConfig, is_moe: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        recompute.check([4, 3], is_moe)
