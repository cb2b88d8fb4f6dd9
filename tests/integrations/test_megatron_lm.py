"""The loss function handed to Megatron's schedules keeps to their contract."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss
from megatron_dppo.integrations.megatron_lm import make_loss_func
from megatron_dppo.loss.dppo_loss import LossOutput
from tests.loss.scenario import VOCAB, make_scenario


def test_it_returns_loss_sum_token_count_and_reduced_pairs() -> None:
    scenario, config = make_scenario(), DPPOConfig(divergence="topk_tv")
    fields = scenario.arguments("rollout_topk_ids", "rollout_topk_log_probs")
    collected: list[LossOutput] = []
    loss_func = make_loss_func(
        config, {**fields, "position_ids": None}, vocab_size=VOCAB, backend="torch", collect=collected.append
    )
    logits = scenario.logits.clone().requires_grad_()
    loss, num_tokens, report = loss_func(logits * 1)
    expected = DPPOLoss(config, vocab_size=VOCAB)(scenario.logits, **fields, backend="torch")
    assert torch.equal(loss, expected.loss)
    assert num_tokens.dtype == torch.int32  # Megatron's running total is int32
    assert int(num_tokens) == int(expected.num_tokens)
    assert all(pair.shape == (2,) and not pair.requires_grad for pair in report.values())
    assert report.keys() == expected.metrics.keys()
    assert collected[0].extrema.keys() == expected.extrema.keys()
    loss.backward()
    assert bool(logits.grad.any())


def test_a_batch_may_be_an_object_and_must_be_complete() -> None:
    fields = make_scenario().arguments()
    loss_func = make_loss_func(DPPOConfig(), SimpleNamespace(**fields), vocab_size=VOCAB, backend="torch")
    assert bool(loss_func(make_scenario().logits)[0].isfinite())
    del fields["advantages"]
    with pytest.raises(ValueError, match="the batch lacks advantages"):
        make_loss_func(DPPOConfig(), fields)
