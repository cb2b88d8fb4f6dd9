"""Inputs at the edge: what must be an error is one, and everything else gives finite, meaningful numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs, LossOutput, Sequences, TopK
from megatron_dppo.errors import LossInputError
from megatron_dppo.loss.config import DIVERGENCES, TRUST_REGIONS
from tests.loss.scenario import VOCAB, make_scenario


def call(
    config: DPPOConfig,
    logits: torch.Tensor,
    vocab_size: int | None = None,
    backend: str = "torch",
    inputs: LossInputs | None = None,
    **changes: Any,
) -> LossOutput:
    if inputs is None:
        tokens = logits.shape[:-1]
        fields = {
            "target": torch.zeros(tokens, dtype=torch.int64),
            "loss_mask": torch.ones(tokens, dtype=torch.bool),
            "advantages": torch.ones(tokens),
            "rollout_log_probs": torch.full(tokens, -0.5),
            **changes,
        }
        inputs = LossInputs(**fields)
    return DPPOLoss(config, vocab_size=vocab_size or logits.shape[-1], backend=backend)(logits, inputs)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("trust_region", TRUST_REGIONS)
def test_extreme_policies_give_finite_loss_and_gradient(divergence: str, trust_region: str, backend: str) -> None:
    """mu = 1, pi = 1, both, log-probs a rounding error above 0, logits of +-1e4 and -inf; A of either sign and 0."""
    logits = torch.tensor(
        [[0.0, 1e4, -1e4, 3.0], [1e4, 0.0, 0.0, 0.0], [1.0, -math.inf, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]]
    )
    logits = logits.repeat(3, 1).requires_grad_()
    rollout_log_probs = torch.tensor([0.0, 0.0, 1e-7, -0.3]).repeat(3)
    target = torch.tensor([2, 0, 1, 3]).repeat(3)
    topk_ids = torch.stack([target, (target + 1) % 4], dim=1)
    topk_log_probs = torch.stack([rollout_log_probs, torch.full((12,), -math.inf)], dim=1)
    out = call(
        DPPOConfig(
            divergence=divergence,
            trust_region=trust_region,
            direction="predictive" if trust_region in ("mask", "smooth") else "ratio",
            entropy_coef=0.1,
        ),
        logits,
        backend=backend,
        target=target,
        advantages=torch.tensor([1.0, -1.0, 0.0]).repeat_interleave(4),
        rollout_log_probs=rollout_log_probs,
        rollout_topk=TopK(ids=topk_ids, log_probs=topk_log_probs),
        rollout_logits=torch.tensor([1e4, -math.inf, 0.0, 2.0]).repeat(12, 1),
    )
    out.loss.backward()
    assert bool(out.loss.isfinite())
    assert bool(out.divergence.isfinite().all())
    assert bool(out.weight.isfinite().all())
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("divergence", ["binary_tv", "binary_kl"])
def test_the_worst_update_is_masked_when_the_rollout_policy_was_certain(divergence: str, backend: str) -> None:
    """mu = 1 and pi nearly 0 with A < 0: with `1 - exp(lp)` this KL is NaN, NaN > delta is False, and the update passes."""
    logits = torch.tensor([[0.0, 20.0]], requires_grad=True)
    tokens = {"advantages": -torch.ones(1), "rollout_log_probs": torch.zeros(1)}
    out = call(DPPOConfig(divergence=divergence), logits, backend=backend, **tokens)
    assert float(out.weight) == 0.0
    out.loss.backward()
    assert not logits.grad.any()


def test_padded_columns_get_gradient_exactly_zero_and_change_nothing(backend: str) -> None:
    scenario, config = make_scenario(), DPPOConfig(entropy_coef=0.1)
    padded, cut = scenario.logits.clone().requires_grad_(), scenario.logits[..., :VOCAB].clone().requires_grad_()
    for logits, vocab_size in ((padded, VOCAB), (cut, None)):
        call(config, logits, vocab_size, inputs=scenario.inputs(), backend=backend).loss.backward()
    assert not padded.grad[..., VOCAB:].any()
    # The rows lie elsewhere: the 22 terms of a row's sums may be added in another order, which moves a sum by at most 21 *
    # 2^-24 of itself. So do the probabilities, which scale the gradient, and, of order 1 itself, the entropy in its factor.
    torch.testing.assert_close(padded.grad[..., :VOCAB], cut.grad, rtol=2 * 21 * 2.0**-24, atol=21 * 2.0**-24)


def test_tokens_with_zero_advantage_have_no_gradient_and_no_place_in_trust_region_statistics(backend: str) -> None:
    logits = torch.randn(5, 7, requires_grad=True)
    advantages = torch.tensor([0.0, 0.0, 1.0, 0.0, -1.0])
    out = call(DPPOConfig(), logits, advantages=advantages, backend=backend)
    out.loss.backward()
    assert not logits.grad[advantages == 0].any()
    assert float(out.metrics.pairs()["dppo/mask_fraction"][1]) == 2
    assert float(out.metrics.pairs()["dppo/divergence_mean"][1]) == 2
    assert int(out.metrics.histogram.sum()) == 2
    assert int(out.num_tokens) == 5


def test_a_token_at_its_rollout_probability_is_never_masked(backend: str) -> None:
    logits = torch.randn(50, 11)
    log_probs = logits.log_softmax(-1)[:, 0]
    out = call(DPPOConfig(delta_low=1e-6, delta_high=1e-6), logits, rollout_log_probs=log_probs, backend=backend)
    assert bool((out.weight == 1).all())


def test_an_empty_mask_gives_zero_loss_zero_gradient_and_no_tokens(backend: str) -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    inputs = {"loss_mask": torch.zeros(2, 3), "rollout_logits": logits.detach()}
    out = call(DPPOConfig(divergence="exact_tv"), logits, backend=backend, **inputs)
    out.loss.backward()
    assert out.loss.item() == 0
    assert int(out.num_tokens) == 0
    assert not logits.grad.any()


def test_nothing_outside_the_mask_is_looked_at(backend: str) -> None:
    scenario = make_scenario()
    clean = call(
        DPPOConfig(divergence="topk_kl"),
        scenario.logits,
        VOCAB,
        inputs=scenario.inputs("rollout_topk"),
        backend=backend,
    )
    outside = ~scenario.loss_mask
    for tensor in (
        scenario.logits,
        scenario.advantages,
        scenario.rollout_log_probs,
        scenario.rollout_topk_log_probs,
    ):
        tensor[outside] = math.nan
    scenario.target[outside] = -100
    scenario.rollout_topk_ids[outside] = -1
    dirty = call(
        DPPOConfig(divergence="topk_kl"),
        scenario.logits,
        VOCAB,
        inputs=scenario.inputs("rollout_topk"),
        backend=backend,
    )
    assert torch.equal(clean.loss, dirty.loss)
    assert torch.equal(clean.divergence, dirty.divergence)


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf, 0.1])
def test_an_impossible_rollout_log_prob_is_an_error_that_names_its_place(value: float) -> None:
    scenario = make_scenario()
    scenario.rollout_log_probs[1, 5] = value
    with pytest.raises(LossInputError, match=r"rollout_log_probs .* batch index 1, position 5"):
        call(DPPOConfig(), scenario.logits, VOCAB, inputs=scenario.inputs())


def test_top_k_mass_above_one_is_an_error() -> None:
    scenario = make_scenario()
    scenario.rollout_topk_log_probs[2, 1] = math.log(0.3)
    with pytest.raises(LossInputError, match=r"sum to more than 1: 1\.\d* at batch index 2, position 1"):
        call(DPPOConfig(divergence="topk_tv"), scenario.logits, VOCAB, inputs=scenario.inputs("rollout_topk"))


WRONG_INPUTS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "needs rollout_topk": ({"divergence": "topk_tv"}, dict),
    "needs rollout_logits": ({"divergence": "exact_kl"}, dict),
    "needs ref_log_probs": ({"kl_coef": 0.1}, dict),
    r"rollout_topk: ids \(4, 2\) and log_probs \(4, 3\) differ": (
        {"divergence": "topk_tv"},
        lambda: {"rollout_topk": TopK(ids=torch.zeros(4, 2, dtype=torch.int64), log_probs=torch.zeros(4, 3))},
    ),
    r"rollout_topk.ids has shape \(3, 2\)": (
        {},
        lambda: {"rollout_topk": TopK(ids=torch.zeros(3, 2, dtype=torch.int64), log_probs=torch.zeros(3, 2))},
    ),
    "target must be torch.int64": ({}, lambda: {"target": torch.zeros(4, dtype=torch.int32)}),
    "sequences.ids has shape": ({}, lambda: {"sequences": Sequences(ids=torch.zeros(3, dtype=torch.int64))}),
    "advantages has shape": ({}, lambda: {"advantages": torch.ones(3)}),
    "must be 0 or 1: 0.5 at token 0": ({}, lambda: {"loss_mask": torch.full((4,), 0.5)}),
    "must be float32": ({}, lambda: {"rollout_log_probs": torch.zeros(4, dtype=torch.bfloat16)}),
    r"target must lie in \[0, 6\): 6 at token 2": ({}, lambda: {"target": torch.tensor([0, 1, 6, 2])}),
    r"target must lie in \[0, 6\): -1 at token 2": ({}, lambda: {"target": torch.tensor([0, 1, -1, 2])}),
    "needs sequences.ids": ({"aggregation": "seq_mean_token_mean"}, dict),
    "rollout_logits has shape": ({"divergence": "exact_tv"}, lambda: {"rollout_logits": torch.zeros(4, 7)}),
}


@pytest.mark.parametrize("message", WRONG_INPUTS)
def test_wrong_inputs_are_named(message: str) -> None:
    config, changes = WRONG_INPUTS[message]
    with pytest.raises(ValueError, match=message):
        call(DPPOConfig(**config), torch.zeros(4, 6), **changes())


def test_log_ratio_is_clamped_against_overflow_only(backend: str) -> None:
    out = call(
        DPPOConfig(trust_region="none"),
        torch.tensor([[50.0, 0.0]]),
        rollout_log_probs=torch.tensor([-1e3]),
        backend=backend,
    )
    assert float(out.loss) == pytest.approx(-math.exp(20.0), rel=1e-5)


def test_smooth_weight_stays_within_its_bounds(backend: str) -> None:
    config = DPPOConfig(trust_region="smooth")
    out = call(
        config,
        8 * torch.randn(200, 5),
        advantages=torch.randn(200),
        rollout_log_probs=-torch.rand(200) * 5,
        backend=backend,
    )
    assert float(out.weight.min()) >= 1 - 1 / 12.5 - 1e-6
    assert float(out.weight.max()) <= 1 + 1 / 12.5 + 1e-6
    assert float(out.weight.std()) > 0


def test_a_top_k_of_no_tokens_is_the_binary_partition(backend: str) -> None:
    logits, mu = torch.randn(2, 3, 7), -torch.rand(2, 3)
    nothing = TopK(ids=torch.zeros(2, 3, 0, dtype=torch.int64), log_probs=torch.zeros(2, 3, 0))
    topk = call(DPPOConfig(divergence="topk_tv"), logits, backend=backend, rollout_log_probs=mu, rollout_topk=nothing)
    binary = call(DPPOConfig(divergence="binary_tv"), logits, backend=backend, rollout_log_probs=mu)
    # 1 - p is rounded once more than p.
    torch.testing.assert_close(topk.divergence, binary.divergence, rtol=1e-6, atol=1e-7)
