"""Every combination of settings gives the loss, the gradient, the weights and the divergences of the papers' formulas."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss
from megatron_dppo.loss.config import AGGREGATIONS, DIRECTIONS, DIVERGENCES, PREDICTIVE_ESTIMATORS, TRUST_REGIONS
from tests.loss.reference import Reference, reference_loss
from tests.loss.scenario import VOCAB, make_scenario

# A log-prob is a difference of fp32 numbers below 8, each off by at most half of the 2^-21 between such: the logit over the
# temperature, its maximum, their difference and the logarithm of the sum, 4 * 2^-22 = 1e-6. That scales probabilities, ratios
# and the gradient. Sums of at most 22 such terms, and the reference's inputs, which are rounded too, add as much.
RELATIVE = 2e-6
# Of a sum of n terms, each off by at most 8 ulp: (n + 8) / 2 ulp of the sum of their absolute values, n = 18; twice that is
# 1.6e-6. Rounding errors of either sign do not add up like that.
LOSS_RELATIVE = 1e-6


@functools.cache  # one backend after the other is compared with it
def expectation(config: DPPOConfig, inputs: tuple[str, ...], seed: int) -> tuple[Reference, torch.Tensor]:
    """The reference's loss and its gradient in the logits."""
    scenario = make_scenario(seed, config.temperature)
    exact = scenario.logits.double().requires_grad_()
    expected = reference_loss(config, exact, VOCAB, scenario.reference_batch(*inputs))
    (gradient,) = torch.autograd.grad(expected.loss, exact)
    return expected, gradient


def compare(backend: str, config: DPPOConfig, *inputs: str, seed: int = 0) -> torch.Tensor:
    """Check loss, gradient, weights and divergences of a backend against the reference; return the weights."""
    scenario = make_scenario(seed, config.temperature)
    expected, expected_grad = expectation(config, inputs, seed)
    logits = scenario.logits.clone().requires_grad_()
    out = DPPOLoss(config, vocab_size=VOCAB, backend=backend)(logits, scenario.inputs(*inputs))
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert out.backend == backend
    assert int(out.num_tokens) == expected.num_tokens
    assert abs(out.loss.item() - expected.loss.item()) < LOSS_RELATIVE * expected.magnitude
    assert float((grad - expected_grad).norm()) <= RELATIVE * float(expected_grad.norm())
    for (b, s), weight in expected.weight.items():
        assert float(out.weight[b, s]) == pytest.approx(weight, rel=RELATIVE)
        assert float(out.divergence[b, s]) == pytest.approx(expected.divergence[b, s], rel=1e-5, abs=1e-6)
    assert not out.weight[~scenario.loss_mask].any()
    assert not out.divergence[~scenario.loss_mask].any()
    return out.weight[scenario.loss_mask]


def inputs_for(divergence: str) -> tuple[str, ...]:
    if divergence.startswith("topk"):
        return ("rollout_topk",)
    return ("rollout_logits",) if divergence.startswith("exact") else ()


@pytest.mark.parametrize(
    ("divergence", "direction", "trust_region"),
    [
        combination
        for combination in itertools.product(DIVERGENCES, DIRECTIONS, TRUST_REGIONS)
        if combination[1] == "ratio" or combination[2] in ("mask", "smooth")  # the others read no direction
    ],
)
def test_every_combination_matches(divergence: str, direction: str, trust_region: str, backend: str) -> None:
    for aggregation in AGGREGATIONS:
        config = DPPOConfig(
            divergence=divergence,
            direction=direction,
            trust_region=trust_region,
            aggregation=aggregation,
            horizon=10 if aggregation == "seq_mean_token_sum_norm" else None,
        )
        weight = compare(backend, config, *inputs_for(divergence))
        if trust_region in ("mask", "ppo_clip"):
            assert 0 < float(weight.mean()) < 1, "a comparison in which nothing (or all) is masked proves nothing"


@pytest.mark.parametrize("estimator", PREDICTIVE_ESTIMATORS)
@pytest.mark.parametrize("divergence", ["binary_tv", "topk_kl"])
def test_predictive_estimators_match(estimator: str, divergence: str, backend: str) -> None:
    config = DPPOConfig(divergence=divergence, direction="predictive", predictive_estimator=estimator)
    compare(backend, config, *inputs_for(divergence), seed=1)


@pytest.mark.parametrize("divergence", ["exact_tv", "exact_kl"])
def test_exact_prefers_the_engines_probabilities_where_it_reported_them(divergence: str, backend: str) -> None:
    compare(backend, DPPOConfig(divergence=divergence), "rollout_logits", "rollout_topk")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "divergence": "topk_tv"},
        {"temperature": 0.7, "divergence": "exact_kl"},
        {"delta_low": 0.01, "delta_high": 0.3},
        {"delta_low": 0.3, "delta_high": 0.01},
        {"ratio_cap": 1.1},
        {"ratio_cap": 1.1, "trust_region": "cispo"},
        {"trust_region": "cispo", "cispo_ratio_min": 0.8, "cispo_ratio_max": 1.2},
        {"trust_region": "smooth", "delta_low": 0.5, "delta_high": 2.0},
        {"trust_region": "ppo_clip", "ppo_dual_clip": 1.2},
        {"trust_region": "ppo_clip", "ppo_clip_low": 0.05, "ppo_clip_high": 0.6},
        {"entropy_coef": 0.3},
        {"entropy_coef": 0.3, "kl_coef": 0.2, "aggregation": "seq_mean_token_mean"},
        {"kl_coef": 0.2, "kl_estimator": "k1"},
        {"kl_coef": 0.2, "kl_estimator": "k2"},
        {"kl_coef": 0.2, "kl_estimator": "k3"},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()),
)
def test_options_match(settings: dict[str, Any], backend: str) -> None:
    config = DPPOConfig(**settings)
    inputs = inputs_for(config.divergence) + (("ref_log_probs",) if config.kl_coef else ())
    compare(backend, config, *inputs)
    plain = compare_loss(DPPOConfig(), inputs, config.temperature)
    assert compare_loss(config, inputs, config.temperature) != plain, "the option has no effect: nothing was tested"


def compare_loss(config: DPPOConfig, inputs: tuple[str, ...], temperature: float) -> float:
    scenario = make_scenario(0, temperature)
    loss = DPPOLoss(config, vocab_size=VOCAB, backend="torch")
    return float(loss(scenario.logits, scenario.inputs(*inputs)).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_reduced_in_fp32(dtype: torch.dtype, backend: str) -> None:
    """The loss of bf16 logits is that of the same values in fp64; only the gradient is rounded, once, to bf16."""
    scenario, config = make_scenario(), DPPOConfig()
    logits = scenario.logits.to(dtype).requires_grad_()
    out = DPPOLoss(config, vocab_size=VOCAB, backend=backend)(logits, scenario.inputs())
    (grad,) = torch.autograd.grad(out.loss, logits)
    exact = logits.detach().double().requires_grad_()
    expected = reference_loss(config, exact, VOCAB, scenario.reference_batch())
    (expected_grad,) = torch.autograd.grad(expected.loss, exact)
    assert abs(out.loss.item() - expected.loss.item()) < 1e-5 * abs(expected.loss.item())
    assert grad.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 * expected_grad.abs() + 1e-7  # fp16 subnormals are 6e-8 apart
    assert bool(((grad.double() - expected_grad).abs() <= rounding * 1.001 + 1e-5 * expected_grad.abs()).all())
