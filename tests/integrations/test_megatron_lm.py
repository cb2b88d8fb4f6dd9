"""The loss function handed to Megatron's schedules keeps to their contract."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LossOutput
from megatron_dppo.errors import LossInputError
from megatron_dppo.integrations.megatron_lm import make_loss_func
from megatron_dppo.ops import logits_route
from megatron_dppo.ops.backend import native_operators
from tests.loss.scenario import VOCAB, make_scenario


def test_it_returns_loss_sum_token_count_and_reduced_pairs() -> None:
    scenario, config = make_scenario(), DPPOConfig(divergence="topk_tv")
    fields = vars(scenario.inputs("rollout_topk"))
    collected: list[LossOutput] = []
    loss_func = make_loss_func(
        config, {**fields, "position_ids": None}, vocab_size=VOCAB, backend="torch", collect=collected.append
    )
    logits = scenario.logits.clone().requires_grad_()
    loss, num_tokens, report = loss_func(logits * 1)
    expected = DPPOLoss(config, vocab_size=VOCAB, backend="torch")(scenario.logits, scenario.inputs("rollout_topk"))
    assert torch.equal(loss, expected.loss)
    assert num_tokens.dtype == torch.int32  # Megatron's running total is int32
    assert int(num_tokens) == int(expected.num_tokens)
    assert all(pair.shape == (2,) and not pair.requires_grad for pair in report.values())
    assert tuple(report) == expected.metrics.mean_names
    # Percentile and maxima, which Megatron's pairs cannot carry, come through the whole output.
    assert collected[0].metrics.finalize() == expected.metrics.finalize()
    assert {"dppo/divergence_p99", "dppo/divergence_max"} <= collected[0].metrics.finalize().keys()
    loss.backward()
    assert bool(logits.grad.any())


def test_two_micro_batches_give_the_gradient_of_our_own_step() -> None:
    """As Megatron's schedules do with ``calculate_per_token_loss``: sums of losses, divided once by the sum of the counts."""
    scenario, config = make_scenario(), DPPOConfig(divergence="binary_tv")
    logits, whole = (scenario.logits.clone().requires_grad_() for _ in range(2))
    total = torch.zeros((), dtype=torch.int32)
    for part in (slice(0, 1), slice(1, None)):
        fields = {name: values[part] for name, values in vars(scenario.inputs()).items() if values is not None}
        loss, num_tokens, _ = make_loss_func(config, fields, vocab_size=VOCAB, backend="torch")(logits[part] * 1)
        loss.backward()
        total += num_tokens
    own = DPPOLoss(config, vocab_size=VOCAB, backend="torch")(whole, scenario.inputs())
    (own.loss / own.num_tokens).backward()
    assert total == own.num_tokens
    assert float((logits.grad / total - whole.grad).abs().max()) < 1e-6


def test_a_batch_may_be_an_object_and_must_be_complete() -> None:
    fields = dict(vars(make_scenario().inputs()))
    loss_func = make_loss_func(DPPOConfig(), SimpleNamespace(**fields), vocab_size=VOCAB, backend="torch")
    assert bool(loss_func(make_scenario().logits)[0].isfinite())
    del fields["advantages"]
    with pytest.raises(LossInputError, match="the batch lacks advantages"):
        make_loss_func(DPPOConfig(), fields, vocab_size=VOCAB)


def test_it_takes_loss_inputs_as_they_are_and_overwrites_the_logits_only_if_asked() -> None:
    for inplace in (False, True):
        source = make_scenario().logits.requires_grad_()
        logits = source * 1
        before = logits.detach().clone()
        loss_func = make_loss_func(
            DPPOConfig(), make_scenario().inputs(), vocab_size=VOCAB, backend="torch", inplace_backward=inplace
        )
        loss_func(logits)[0].backward()
        assert torch.equal(logits, before) == (not inplace)


def test_a_promise_lets_the_call_itself_overwrite_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_route, "_workers", lambda device: (0, float("inf")))
    gradients, overwritten = [], []
    for promise in (1.0, None):
        source = make_scenario().logits.requires_grad_()
        logits = source * 1
        loss_func = make_loss_func(
            *(DPPOConfig(), make_scenario().inputs()),
            **{"vocab_size": VOCAB, "inplace_backward": True, "backward_scale": promise},
        )
        loss = loss_func(logits)[0]
        overwritten.append(not torch.equal(logits, source))
        loss.backward()
        gradients.append(source.grad)
    assert overwritten == [native_operators(torch.device("cpu")) is not None, False]
    assert torch.equal(*gradients)


def test_sharded_logits_without_their_group_are_an_error() -> None:
    half = make_scenario().logits[..., :12]
    with pytest.raises(ValueError, match="vocab_size is 22, but 1 shard"):
        make_loss_func(DPPOConfig(), make_scenario().inputs(), vocab_size=VOCAB)(half)
