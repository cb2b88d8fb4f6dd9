"""The loss of every token from log-probs that somebody else computed is DPPOLoss's, and promises nothing more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss, TokenLosses, token_losses, vocab_parallel_policy_stats
from megatron_dppo.errors import ConfigError, LossInputError
from megatron_dppo.loss.config import TRUST_REGIONS
from tests.device_waits import DeviceWaits
from tests.loss.scenario import VOCAB, Scenario, make_scenario


def call(scenario: Scenario, config: DPPOConfig, logits: torch.Tensor, **options: Any) -> TokenLosses:
    stats = vocab_parallel_policy_stats(logits, scenario.target, vocab_size=VOCAB, backend="torch")
    fields = {
        "rollout_log_probs": scenario.rollout_log_probs,
        "advantages": scenario.advantages,
        "loss_mask": scenario.loss_mask,
    }
    return token_losses(config, stats.log_prob, **{**fields, **options})


@pytest.mark.parametrize("divergence", ["binary_tv", "binary_kl"])
@pytest.mark.parametrize("trust_region", TRUST_REGIONS)
def test_it_is_the_whole_loss_token_by_token(trust_region: str, divergence: str, backend: str) -> None:
    scenario, config = make_scenario(), DPPOConfig(divergence=divergence, trust_region=trust_region, ratio_cap=2.0)
    logits, whole = (scenario.logits.clone().requires_grad_() for _ in range(2))
    expected = DPPOLoss(config, vocab_size=VOCAB, backend=backend)(whole, scenario.inputs())
    found = call(scenario, config, logits, backend=backend)
    expected.loss.backward()
    found.per_token.sum().backward()
    # The same operations but for the order of one sum of 18 terms, and the log-probs' own operator: a few roundings each.
    torch.testing.assert_close(found.per_token.sum(), expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad, whole.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.weight, expected.weight)
    assert not found.per_token[~scenario.loss_mask].any()
    metrics, all_metrics = found.metrics.finalize(), expected.metrics.finalize()
    assert all_metrics.keys() - metrics.keys() == {"entropy", "loss"}  # what is not known, and what is not summed
    for name, value in metrics.items():
        assert value == pytest.approx(all_metrics[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    "option",
    [
        {"divergence": "topk_tv"},
        {"divergence": "exact_kl"},
        {"direction": "predictive"},
        {"aggregation": "seq_mean_token_mean"},
        {"temperature": 0.7},
        {"entropy_coef": 0.1},
        {"kl_coef": 0.1},
        {"kl_estimator": "k1"},
    ],
)
def test_what_would_not_be_read_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        call(make_scenario(), DPPOConfig(**option), make_scenario().logits)


IMPOSSIBLE: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "advantages must be finite: inf at batch index 0, position 1$": lambda: {
        "advantages": torch.full((3, 8), math.inf)
    },
    "rollout_log_probs must be finite and, but for rounding, not above 0": lambda: {
        "rollout_log_probs": torch.full((3, 8), 0.5)
    },
    "loss_mask must be 0 or 1: 2": lambda: {"loss_mask": torch.full((3, 8), 2)},
    r"advantages has shape \(3, 7\), the policy's log_probs \(3, 8\)": lambda: {"advantages": torch.zeros(3, 7)},
    "rollout_log_probs must be float32, not torch.float16": lambda: {"rollout_log_probs": torch.zeros(3, 8).half()},
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible_inputs_are_named(message: str) -> None:
    scenario = make_scenario()
    with pytest.raises(LossInputError, match=message):
        call(scenario, DPPOConfig(), scenario.logits, **IMPOSSIBLE[message]())


def test_a_policys_nan_is_found_and_a_token_without_probability_is_none() -> None:
    scenario = make_scenario()
    fields = {
        "rollout_log_probs": scenario.rollout_log_probs,
        "advantages": scenario.advantages,
        "loss_mask": scenario.loss_mask,
    }
    log_probs = torch.full((3, 8), -1.0)
    log_probs[1, 5] = math.nan
    with pytest.raises(LossInputError, match="log_probs must not be NaN"):
        token_losses(DPPOConfig(), log_probs, **fields)
    log_probs[1, 5] = -math.inf
    found = token_losses(DPPOConfig(divergence="binary_kl"), log_probs.requires_grad_(), **fields)
    found.per_token.sum().backward()
    assert bool(found.divergence.isfinite().all())
    assert bool(log_probs.grad.isfinite().all())


@pytest.mark.parametrize("checks", ["deferred", "off"])
def test_it_does_not_wait_for_the_device(checks: str, backend: str) -> None:
    scenario = make_scenario()
    log_probs = torch.full((3, 8), -1.0).requires_grad_()
    with DeviceWaits() as waits:
        found = token_losses(
            DPPOConfig(),
            log_probs,
            rollout_log_probs=scenario.rollout_log_probs,
            advantages=scenario.advantages,
            loss_mask=scenario.loss_mask,
            backend=backend,
            checks=checks,
        )
        found.per_token.sum().backward()
        if found.checks is not None:
            found.checks.failed()
    assert waits.found == []
