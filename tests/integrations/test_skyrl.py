"""The SkyRL adapter, called with what its own worker passes to a registered policy loss (records/skyrl.json)."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dppo import DPPOConfig
from megatron_dppo.errors import ConfigError, LossInputError, MissingDependencyError
from megatron_dppo.integrations import skyrl as adapter
from tests.integrations.recording import load
from tests.integrations.rollouts import CONFIG, TEMPERATURE, VOCAB, own_step, packed_logits
from tests.integrations.stand_ins import forbid, install

RECORD = load("skyrl")
MASK = RECORD["call"]["loss_mask"].bool()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A SkyRL of the recorded version; what is registered with it."""
    losses: dict[str, Any] = {}
    correction = {"off_policy_correction_enabled": lambda config: config["tis_ratio_type"] is not None}
    install(
        monkeypatch,
        {
            "skyrl": {"__version__": RECORD["version"]},
            "skyrl.backends.skyrl_train.utils.ppo_utils": {
                "PolicyLossRegistry": SimpleNamespace(register=losses.__setitem__)
            },
            "skyrl.backends.skyrl_train.utils.off_policy_correction_utils": correction,
        },
    )
    return losses


def recorded_call(log_probs: torch.Tensor, **changed: Any) -> dict[str, Any]:
    call = RECORD["call"]
    config = SimpleNamespace(**{**call["config"], **changed.pop("config", {})})
    return {**call, "config": config, "log_probs": log_probs, **changed}


def response_log_probs(logits: torch.Tensor) -> torch.Tensor:
    """[b, r] as SkyRL computes them, with gradient; 0 where there is padding."""
    rows = RECORD["rows"]
    log_probs = (logits[rows.clamp(min=0), :VOCAB] / TEMPERATURE).log_softmax(-1)
    return torch.where(rows >= 0, log_probs.gather(-1, RECORD["tokens"][..., None])[..., 0], 0.0)


@pytest.mark.parametrize(
    ("reduction", "aggregation", "horizon"),
    [
        ("token_mean", "token_mean", None),
        ("sequence_mean", "seq_mean_token_mean", None),
        ("seq_mean_token_sum_norm", "seq_mean_token_sum_norm", 8),
    ],
)
def test_the_gradient_is_that_of_our_own_step(
    registry: dict[str, Any], reduction: str, aggregation: str, horizon: int | None
) -> None:
    adapter.register("divergence_ppo", CONFIG, backend="torch")
    logits = packed_logits().requires_grad_()
    log_probs = response_log_probs(logits)
    torch.testing.assert_close(log_probs[MASK], RECORD["call"]["log_probs"][MASK], rtol=0, atol=1e-6)
    loss, _ = registry["divergence_ppo"](**recorded_call(log_probs, advantages=RECORD["scaled"][reduction]))
    loss.backward()
    config = dataclasses.replace(CONFIG, temperature=TEMPERATURE, aggregation=aggregation, horizon=horizon)
    mean, gradient = own_step(config, VOCAB)
    assert abs(loss.item() - mean.item()) < 1e-6
    assert float((logits.grad - gradient).abs().max()) < 1e-6
    assert float(gradient.abs().max()) > 5e-3


def test_the_worker_passed_advantages_that_were_divided_already() -> None:
    call = RECORD["call"]
    torch.testing.assert_close(call["advantages"], RECORD["scaled"]["token_mean"], rtol=0, atol=0)
    torch.testing.assert_close(call["advantages"] * 16, RECORD["advantages"], rtol=1e-6, atol=0)


def test_metrics_are_numbers_and_the_same_for_every_micro_batch(registry: dict[str, Any]) -> None:
    loss = adapter.register("divergence_ppo", CONFIG)
    assert registry["divergence_ppo"] is loss
    _, metrics = loss(**recorded_call(RECORD["call"]["log_probs"]))
    _, nothing = loss(
        **recorded_call(RECORD["call"]["log_probs"], loss_mask=torch.zeros_like(MASK, dtype=torch.float32))
    )
    assert metrics.keys() == nothing.keys()
    assert all(isinstance(value, float) for value in [*metrics.values(), *nothing.values()])
    assert metrics["clip_ratio"] == metrics["dppo/mask_fraction"] > 0
    assert nothing["clip_ratio"] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rollout_logprobs": None}, r"skyrl: the batch has no rollout_logprobs.*sampling_params\.logprobs=1"),
        (
            {"config": {"off_policy_correction": {"tis_ratio_type": "token"}}},
            "skyrl: off_policy_correction is for an anchor",
        ),
        ({"rollout_logprobs": torch.full((4, 8), torch.nan)}, "rollout_log_probs must be finite"),
    ],
)
def test_what_it_cannot_do_is_refused(registry: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    loss = adapter.register("divergence_ppo", CONFIG)
    with pytest.raises((ConfigError, LossInputError), match=message):
        loss(**recorded_call(RECORD["call"]["log_probs"], **changed))


def test_the_default_of_off_policy_correction_is_not_in_the_way() -> None:
    assert RECORD["correction_by_default"] is False
    assert RECORD["call"]["config"]["off_policy_correction"]["tis_ratio_type"] is None


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, registry: dict[str, Any]) -> None:
    assert RECORD["version"] in adapter.RECORDED_VERSIONS
    with pytest.raises(ConfigError, match="kl_coef"):
        adapter.register("divergence_ppo", DPPOConfig(kl_coef=0.1))
    install(monkeypatch, {"skyrl": {"__version__": "0.4.0"}})
    with pytest.raises(ConfigError, match=r"skyrl 0\.4\.0: .* known of 0\.3\.0 only"):
        adapter.register("divergence_ppo", CONFIG)
    forbid(monkeypatch, "skyrl")
    with pytest.raises(MissingDependencyError, match="the adapter for skyrl needs skyrl"):
        adapter.register("divergence_ppo", CONFIG)
    assert registry == {}
