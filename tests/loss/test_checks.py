"""Impossible inputs are found where they are, and reported when somebody looks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs, LossOutput, Sequences, TopK
from megatron_dppo.errors import LossInputError
from megatron_dppo.loss.config import AGGREGATIONS
from tests.loss.scenario import BATCH, LENGTH, VOCAB, Scenario, make_scenario

AT = (1, 5)  # inside the mask; (0, 0) is outside


def set_value(inputs: LossInputs, field: str, value: Any, at: tuple[int, int] = AT) -> LossInputs:
    inner, _, outer = field.rpartition(".")[::-1]
    holder = getattr(inputs, outer) if outer else inputs
    tensor = getattr(holder, inner).clone()
    tensor[at] = torch.tensor(value, dtype=tensor.dtype)
    changed = dataclasses.replace(holder, **{inner: tensor})
    return dataclasses.replace(inputs, **{outer: changed}) if outer else changed


def call(scenario: Scenario, inputs: LossInputs, checks: str, backend: str = "torch") -> LossOutput:
    config = DPPOConfig(divergence="topk_tv", aggregation="seq_mean_token_mean")
    return DPPOLoss(config, vocab_size=VOCAB, backend=backend, checks=checks)(scenario.logits, inputs)


def all_inputs(scenario: Scenario) -> LossInputs:
    lengths = scenario.loss_mask.sum(1, keepdim=True).expand(BATCH, LENGTH)
    ids = torch.arange(BATCH)[:, None].expand(BATCH, LENGTH)
    return dataclasses.replace(
        scenario.inputs("rollout_topk", "ref_log_probs"),
        loss_mask=scenario.loss_mask.long(),
        sequences=Sequences(ids=ids, lengths=lengths),
    )


IMPOSSIBLE = [
    ("target", VOCAB, "target must lie in [0, 22): 22"),
    ("target", -1, "target must lie in [0, 22): -1"),
    ("advantages", math.inf, "advantages must be finite: inf"),
    ("rollout_log_probs", math.nan, "rollout_log_probs must be finite and, but for rounding, not above 0: nan"),
    ("rollout_log_probs", -math.inf, "rollout_log_probs must be finite and, but for rounding, not above 0: -inf"),
    ("rollout_log_probs", 0.1, "rollout_log_probs must be finite and, but for rounding, not above 0: 0.1"),
    ("rollout_topk.ids", [0, 1, VOCAB, 3], "rollout_topk.ids must lie in [0, 22): 22"),
    ("rollout_topk.log_probs", [-1, -2, math.nan, -3], "rollout_topk.log_probs must not be NaN nor, but for rounding"),
    (
        "rollout_topk.log_probs",
        [-0.1, -0.1, -9, -9],
        "the rollout top-K probabilities must not sum to more than 1: 1.80",
    ),
    ("ref_log_probs", math.nan, "ref_log_probs must be finite: nan"),
    ("sequences.lengths", 1, "sequences.lengths is smaller than the number of the sequence's masked-in tokens: 1"),
    ("sequences.lengths", 99, "sequences.lengths says that a sequence is spread over ranks: give sequences.starts too"),
    ("loss_mask", 2, "loss_mask must be 0 or 1: 2"),
]


@pytest.mark.parametrize(("field", "value", "message"), IMPOSSIBLE, ids=lambda value: str(value)[:24])
def test_an_impossible_value_is_named_at_once_later_or_never(
    field: str, value: Any, message: str, backend: str
) -> None:
    scenario = make_scenario()
    inputs = set_value(all_inputs(scenario), field, value)
    token = int(inputs.target[AT])
    with pytest.raises(LossInputError) as now:
        call(scenario, inputs, "now", backend)
    assert str(now.value).startswith(message)
    assert str(now.value).endswith(f"at batch index 1, position 5 (token id {token})")
    output = call(scenario, inputs, "deferred", backend)  # nothing is raised
    assert output.checks is not None
    assert bool(output.checks.failed())
    with pytest.raises(LossInputError) as later:
        output.checks.raise_errors()
    assert str(later.value) == str(now.value)
    with pytest.raises(LossInputError, match="at the 13th token"):
        output.checks.raise_errors(lambda position: f"the {position}th token")
    assert call(scenario, inputs, "off", backend).checks is None


@pytest.mark.parametrize(("field", "value", "message"), IMPOSSIBLE[:-1], ids=lambda value: str(value)[:24])
def test_outside_the_mask_nothing_is_impossible(field: str, value: Any, message: str) -> None:
    scenario = make_scenario()
    inputs = set_value(all_inputs(scenario), field, value, at=(0, 0))
    clean = call(scenario, all_inputs(scenario), "now")
    assert torch.equal(call(scenario, inputs, "now").loss, clean.loss)


def test_good_inputs_pass_and_the_answer_stays_on_the_device() -> None:
    scenario = make_scenario()
    checks = call(scenario, all_inputs(scenario), "deferred").checks
    assert checks is not None
    assert checks.failed().shape == ()
    assert not bool(checks.failed())
    assert checks.record.shape == (len(checks.messages), 3)
    checks.raise_errors()


def test_no_tokens_at_all_are_fine() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    inputs = LossInputs(target=nothing, loss_mask=None, advantages=nothing.float(), rollout_log_probs=nothing.float())
    output = DPPOLoss(DPPOConfig(), vocab_size=5)(torch.zeros(0, 5, requires_grad=True), inputs)
    assert float(output.loss.detach()) == 0
    assert int(output.num_tokens) == 0


def test_fields_that_the_rule_does_not_read_are_not_looked_at() -> None:
    scenario = make_scenario()
    nonsense = TopK(ids=torch.full((BATCH, LENGTH, 2), -7), log_probs=torch.full((BATCH, LENGTH, 2), math.nan))
    inputs = dataclasses.replace(scenario.inputs(), rollout_topk=nonsense)
    loss = DPPOLoss(DPPOConfig(), vocab_size=VOCAB)
    assert torch.equal(loss(scenario.logits, inputs).loss, loss(scenario.logits, scenario.inputs()).loss)


def test_the_choice_is_checked() -> None:
    with pytest.raises(ValueError, match="checks must be one of now, deferred, off, not 'later'"):
        DPPOLoss(DPPOConfig(), vocab_size=5, checks="later")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_taking_the_rows_of_the_mask_changes_nothing(aggregation: str, backend: str) -> None:
    """Compact inputs of compact logits, every token counting, against the mask."""
    scenario = make_scenario()
    horizon = 9 if aggregation == "seq_mean_token_sum_norm" else None
    config = DPPOConfig(divergence="topk_kl", aggregation=aggregation, horizon=horizon, entropy_coef=0.1, kl_coef=0.1)
    loss = DPPOLoss(config, vocab_size=VOCAB, backend=backend)
    ids = torch.arange(BATCH)[:, None].expand(BATCH, LENGTH)
    inputs = dataclasses.replace(scenario.inputs("rollout_topk", "ref_log_probs"), sequences=Sequences(ids=ids))
    rows = scenario.loss_mask.flatten().nonzero()[:, 0]
    compact = inputs.take(rows)
    assert compact.target.shape == (len(rows),)
    results = []
    for taken in (inputs, compact, dataclasses.replace(compact, loss_mask=None)):
        leaf = scenario.logits.clone().requires_grad_()
        logits = leaf if taken is inputs else leaf.flatten(0, 1).index_select(0, rows)
        output = loss(logits, taken)
        output.loss.backward()
        results.append((output, leaf.grad))
    (masked, masked_grad), *others = results
    for output, grad in others:
        # The same terms, summed in another order.
        torch.testing.assert_close(output.loss, masked.loss, rtol=1e-5, atol=1e-6)
        assert int(output.num_tokens) == int(masked.num_tokens)
        torch.testing.assert_close(output.metrics.means, masked.metrics.means, rtol=1e-6, atol=1e-6)
        assert torch.equal(output.metrics.maxima, masked.metrics.maxima)
        assert torch.equal(output.weight, masked.weight[scenario.loss_mask])
        torch.testing.assert_close(grad, masked_grad, rtol=1e-6, atol=1e-9)


def test_everything_moves_to_another_device_together() -> None:
    inputs = all_inputs(make_scenario()).to(torch.device("meta"))
    assert inputs.rollout_topk is not None
    assert inputs.sequences is not None
    tensors = [inputs.target, inputs.rollout_topk.ids, inputs.sequences.lengths, inputs.ref_log_probs]
    assert all(tensor is not None and tensor.is_meta for tensor in tensors)
