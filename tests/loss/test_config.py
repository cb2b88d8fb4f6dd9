"""The configuration: defaults follow the divergence, wrong values are refused by name, OmegaConf can carry it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_dppo import DPPOConfig
from megatron_dppo.errors import ConfigError
from megatron_dppo.loss.config import DIVERGENCES


@pytest.mark.parametrize(
    ("settings", "thresholds"),
    [
        ({}, (0.15, 0.15)),
        ({"divergence": "topk_tv"}, (0.15, 0.15)),
        ({"divergence": "exact_tv"}, (0.15, 0.15)),
        ({"divergence": "binary_kl"}, (0.05, 0.05)),
        ({"divergence": "topk_kl", "delta_high": 0.2}, (0.05, 0.2)),
        ({"divergence": "exact_kl", "delta_low": 0.2}, (0.2, 0.05)),
        ({"trust_region": "smooth", "divergence": "binary_kl"}, (12.5, 12.5)),
    ],
)
def test_thresholds_belong_to_the_divergence(settings: dict[str, Any], thresholds: tuple[float, float]) -> None:
    assert DPPOConfig(**settings).thresholds == thresholds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "tv"}, r"DPPOConfig\.divergence must be one of binary_tv, .*exact_kl, not 'tv'"),
        ({"direction": "up"}, r"DPPOConfig\.direction must be one of ratio, predictive"),
        ({"trust_region": "clip"}, r"DPPOConfig\.trust_region must be one of mask, smooth"),
        ({"aggregation": "mean"}, r"DPPOConfig\.aggregation must be one of token_mean"),
        ({"kl_estimator": "k4"}, r"DPPOConfig\.kl_estimator must be one of k1, k2, k3"),
        ({"predictive_estimator": "x"}, r"DPPOConfig\.predictive_estimator must be one of"),
        ({"delta_low": 0.0}, r"DPPOConfig\.delta_low must be a number above 0"),
        ({"delta_high": float("nan")}, r"DPPOConfig\.delta_high"),
        ({"temperature": 0.0}, r"DPPOConfig\.temperature"),
        ({"temperature": "hot"}, r"DPPOConfig\.temperature"),
        ({"ratio_cap": -1.0}, r"DPPOConfig\.ratio_cap"),
        ({"trust_region": "ppo_clip", "ppo_clip_low": 1.0}, r"DPPOConfig\.ppo_clip_low"),
        ({"ppo_dual_clip": 0.5}, r"DPPOConfig\.ppo_dual_clip"),
        ({"cispo_ratio_min": 6.0}, r"DPPOConfig\.cispo_ratio_min"),
        ({"entropy_coef": -0.1}, r"DPPOConfig\.entropy_coef"),
        ({"aggregation": "seq_mean_token_sum_norm"}, r"DPPOConfig\.horizon must be set"),
    ],
)
def test_wrong_values_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPPOConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trust_region": "ppo_clip", "delta_low": 0.1},
            "delta_low=0.1 is not read with trust_region='ppo_clip', only with",
        ),
        ({"trust_region": "none", "delta_high": 0.1}, "delta_high"),
        ({"trust_region": "cispo", "direction": "predictive"}, "direction='predictive' is not read with"),
        ({"predictive_estimator": "uniform_tail"}, "predictive_estimator='uniform_tail' .* only with 'predictive'"),
        ({"horizon": 8}, "horizon=8 is not read with aggregation='token_mean'"),
        ({"ppo_clip_low": 0.1}, "ppo_clip_low=0.1 is not read with trust_region='mask', only with 'ppo_clip'"),
        ({"ppo_clip_high": 0.1}, "ppo_clip_high"),
        ({"ppo_dual_clip": 3.0}, "ppo_dual_clip"),
        ({"cispo_ratio_min": 0.5}, "cispo_ratio_min"),
        ({"cispo_ratio_max": 2.0}, "cispo_ratio_max=2.0 .* leave it at 5.0, or choose one of those"),
    ],
)
def test_a_field_that_the_chosen_rule_does_not_read_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DPPOConfig(**settings)


def test_it_says_what_it_needs() -> None:
    needs = {
        divergence: (config.partition, config.kind, config.needs_topk, config.reads_topk, config.needs_rollout_logits)
        for divergence in DIVERGENCES
        for config in [DPPOConfig(divergence=divergence)]
    }
    assert needs["binary_tv"] == ("binary", "tv", False, False, False)
    assert needs["topk_kl"] == ("topk", "kl", True, True, False)
    assert needs["exact_tv"] == ("exact", "tv", False, True, True)
    assert DPPOConfig(direction="predictive").needs_topk


def test_it_cannot_be_changed_once_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DPPOConfig().delta_low = 3.0  # type: ignore[misc]


def test_omegaconf_carries_it_there_and_back() -> None:
    node = OmegaConf.merge(
        OmegaConf.structured(DPPOConfig), OmegaConf.create({"divergence": "topk_kl", "delta_low": 1})
    )
    assert OmegaConf.to_object(node) == DPPOConfig(divergence="topk_kl", delta_low=1.0)
