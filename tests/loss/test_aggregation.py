"""The same batch gives the same global loss and gradient however it is split, padded or packed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs, LossOutput, Sequences
from megatron_dppo.errors import LossInputError
from megatron_dppo.loss.config import AGGREGATIONS
from tests.loss.scenario import BATCH, LENGTH, VOCAB, Scenario, make_scenario


def config_of(aggregation: str) -> DPPOConfig:
    horizon = 9 if aggregation == "seq_mean_token_sum_norm" else None
    return DPPOConfig(divergence="topk_tv", aggregation=aggregation, horizon=horizon, entropy_coef=0.01)


def parts_of(
    scenario: Scenario, config: DPPOConfig, parts: list[tuple[torch.Tensor, Sequences]]
) -> tuple[float, torch.Tensor]:
    """Global loss and gradient [b, s, V] when each part (flat token indices, their sequences) is one micro-batch."""
    logits = scenario.logits.clone().requires_grad_()
    flat = logits.view(BATCH * LENGTH, -1)
    outputs: list[LossOutput] = []
    for indices, sequences in parts:
        inputs = dataclasses.replace(scenario.inputs("rollout_topk").take(indices), sequences=sequences)
        outputs.append(DPPOLoss(config, vocab_size=VOCAB, backend="torch")(flat[indices], inputs))
    loss = sum(out.loss for out in outputs) / sum(int(out.num_tokens) for out in outputs)
    (grad,) = torch.autograd.grad(loss, logits)
    return loss.item(), grad


def whole(scenario: Scenario, config: DPPOConfig) -> tuple[float, torch.Tensor]:
    logits = scenario.logits.clone().requires_grad_()
    out = DPPOLoss(config, vocab_size=VOCAB, backend="torch")(logits, scenario.inputs("rollout_topk"))
    loss = out.loss / out.num_tokens
    (grad,) = torch.autograd.grad(loss, logits)
    return loss.item(), grad


def every_token() -> tuple[torch.Tensor, torch.Tensor]:
    """[b s] the row of every token, and its place among all tokens."""
    return torch.arange(BATCH).repeat_interleave(LENGTH), torch.arange(BATCH * LENGTH)


def test_a_response_of_one_token_weighs_as_much_as_a_long_one() -> None:
    """On the policy itself a token's loss is -A: the mean over sequences of their means."""
    log_probs = torch.tensor([0.5, 0.25, 0.25]).log()
    logits = log_probs.expand(4, 3)
    target, advantages = torch.tensor([0, 1, 2, 0]), torch.tensor([1.0, 2.0, 4.0, 6.0])
    inputs = LossInputs(
        target=target,
        loss_mask=None,
        advantages=advantages,
        rollout_log_probs=log_probs[target],
        sequences=Sequences(ids=torch.tensor([0, 1, 1, 1])),
    )
    out = DPPOLoss(DPPOConfig(aggregation="seq_mean_token_mean"), vocab_size=3, backend="torch")(logits, inputs)
    assert float(out.loss / out.num_tokens) == pytest.approx(-(1.0 + (2.0 + 4.0 + 6.0) / 3) / 2)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_split_of_whole_sequences_and_any_packing_agree(aggregation: str) -> None:
    scenario, config = make_scenario(), config_of(aggregation)
    rows, every = every_token()
    loss, grad = whole(scenario, config)
    shuffled = every[torch.randperm(len(every))]
    for groups in ([every], [shuffled], [every[rows == 0], every[rows != 0]], [every[r == rows] for r in range(BATCH)]):
        split_loss, split_grad = parts_of(scenario, config, [(g, Sequences(ids=rows[g])) for g in groups])
        # The same fp32 terms summed in another order.
        assert split_loss == pytest.approx(loss, rel=1e-6, abs=1e-7)
        torch.testing.assert_close(split_grad, grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_sequences_spread_over_ranks_agree(aggregation: str) -> None:
    """As context parallelism splits them: every sequence's tokens on both ranks, in its zig-zag order."""
    scenario, config = make_scenario(), config_of(aggregation)
    rows, every = every_token()
    loss, grad = whole(scenario, config)
    lengths = scenario.loss_mask.sum(1, keepdim=True).expand(BATCH, LENGTH).reshape(-1)
    starts = ((scenario.loss_mask.cumsum(1) == 1) & scenario.loss_mask).reshape(-1)
    position, quarter = every % LENGTH, LENGTH // 4
    outer = (position < quarter) | (position >= 3 * quarter)
    parts = [(g, Sequences(ids=rows[g], lengths=lengths[g], starts=starts[g])) for g in (every[outer], every[~outer])]
    split_loss, split_grad = parts_of(scenario, config, parts)
    assert split_loss == pytest.approx(loss, rel=1e-6, abs=1e-7)
    torch.testing.assert_close(split_grad, grad, rtol=1e-5, atol=1e-8)


def test_a_spread_sequence_without_starts_is_an_error_not_a_wrong_denominator() -> None:
    scenario, config = make_scenario(), config_of("seq_mean_token_mean")
    rows, every = every_token()
    half = every[every % LENGTH < 4]
    lengths = scenario.loss_mask.sum(1, keepdim=True).expand(BATCH, LENGTH).reshape(-1)
    with pytest.raises(LossInputError, match=r"give sequences\.starts too"):
        parts_of(scenario, config, [(half, Sequences(ids=rows[half], lengths=lengths[half]))])
    too_short = torch.ones_like(lengths)
    with pytest.raises(LossInputError, match=r"sequences\.lengths is smaller"):
        parts_of(scenario, config, [(every, Sequences(ids=rows, lengths=too_short))])


def test_an_empty_sequence_is_not_counted() -> None:
    scenario = make_scenario()
    scenario.loss_mask[1] = False
    for aggregation in AGGREGATIONS[1:]:
        loss = DPPOLoss(config_of(aggregation), vocab_size=VOCAB, backend="torch")
        out = loss(scenario.logits, scenario.inputs("rollout_topk"))
        assert int(out.num_tokens) == 2
