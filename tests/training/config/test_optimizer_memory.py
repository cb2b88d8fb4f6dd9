"""``train.optimizer_memory``: what it tells core, what is refused, and why a second moment in bf16 needs a smaller beta2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.optimizer_memory import OptimizerMemoryConfig

FITS: dict[str, Any] = {
    "dtype": "bf16",
    "distributed": True,
    "device": "cuda",
    "beta2": 0.95,
    "transformer_engine": None,
}


@pytest.mark.parametrize(
    ("memory", "change", "message"),
    [
        ({"first_moment": "fp16"}, {}, "first_moment must be one of fp32, bf16"),
        ({"offload_fraction": 1.5}, {}, "must be from 0 to 1"),
        ({"first_moment": "bf16"}, {"distributed": False}, "first_moment needs GPUs"),
        ({"second_moment": "bf16"}, {"dtype": "fp32"}, "second_moment needs GPUs, model.dtype=bf16"),
        ({"offload_fraction": 0.5}, {"device": "cpu"}, "offload_fraction needs GPUs"),
        ({"first_moment": "bf16", "offload_fraction": 0.5}, {}, "the CPU's Adam has fp32 moments"),
        (
            {"first_moment": "bf16"},
            {"transformer_engine": "is not installed"},
            "first_moment needs .*: is not installed",
        ),
        (
            {"offload_fraction": 1},
            {"transformer_engine": "is not installed"},
            "offload_fraction needs .*: is not installed",
        ),
        ({"second_moment": "bf16"}, {"beta2": 0.999}, "adam_beta2=0.999: .* 0.996 at most"),
    ],
)
def test_what_core_or_the_arithmetic_cannot_do_is_refused(
    memory: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerMemoryConfig(**memory).check(**FITS | change)


@pytest.mark.parametrize(
    "memory",
    [{}, {"first_moment": "bf16", "second_moment": "bf16"}, {"offload_fraction": 1.0}],
)
def test_what_fits_is_accepted_and_in_words_that_core_knows(
    memory: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Core 0.16 compares the version of a Transformer Engine that is not there.
    monkeypatch.setattr("megatron.core.optimizer.optimizer_config.is_te_min_version", lambda version: False)
    config = OptimizerMemoryConfig(**memory)
    config.check(**FITS)
    fields = config.optimizer_fields()
    assert fields.keys() <= OptimizerConfig.__dataclass_fields__.keys()
    assert bool(fields) == bool(memory)
    if memory:
        assert fields["use_precision_aware_optimizer"]
        assert not fields["store_param_remainders"]
    if "offload_fraction" in memory:
        built = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True, bf16=True, **fields)
        assert built.optimizer_cpu_offload
        assert built.optimizer_offload_fraction == 1.0
    elif memory:
        assert fields["exp_avg_dtype"] is fields["exp_avg_sq_dtype"] is torch.bfloat16
        with pytest.raises(RuntimeError, match="FusedAdam from TransformerEngine"):  # core reads it, and asks for that
            OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True, bf16=True, **fields)


@pytest.mark.parametrize(("beta2", "falls"), [(0.999, False), (1 - 2.0**-8, True)])
def test_a_second_moment_in_bf16_falls_only_if_a_step_is_large_enough_to_show(beta2: float, falls: bool) -> None:
    """Without gradients it should fall by 1 - beta2 a step: from every number that bf16 has between two powers of two."""
    moments = torch.arange(128, 256).float() / 128
    assert torch.equal(moments.bfloat16().float(), moments)
    fallen = (moments * beta2).bfloat16().float() < moments
    assert bool(fallen.all()) == falls
