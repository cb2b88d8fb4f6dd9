"""With a promise of what backward is called with, the loss and its gradient come from one pass, and are those of two."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs, LossOutput
from megatron_dppo.loss.config import AGGREGATIONS, DIRECTIONS, DIVERGENCES, TRUST_REGIONS
from megatron_dppo.ops import logits_route
from tests.loss.scenario import PADDED, VOCAB, make_scenario

RULES = [
    (divergence, direction, trust_region)
    for divergence, direction, trust_region in itertools.product(DIVERGENCES, DIRECTIONS, TRUST_REGIONS)
    if not divergence.startswith("exact") and (direction == "ratio" or trust_region in ("mask", "smooth"))
]


@pytest.fixture(autouse=True)
def _whatever_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_route, "_workers", lambda device: (0, float("inf")))


def loss_of(backend: str, promise: float | None = 1.0, **config: Any) -> DPPOLoss:
    return DPPOLoss(
        DPPOConfig(**config),
        vocab_size=VOCAB,
        backend=backend,
        inplace_backward=True,
        backward_scale=promise,
        checks="off",
    )


def call(
    loss: DPPOLoss, inputs: LossInputs, dtype: torch.dtype, scale: float = 1.0
) -> tuple[LossOutput, torch.Tensor, bool]:
    """The output, the gradient, and whether the logits were overwritten before backward."""
    leaf = make_scenario().logits.to(dtype).requires_grad_()
    logits = leaf * 1
    output = loss(logits, inputs)
    overwritten = not torch.equal(logits, leaf)
    (scale * output.loss).backward()
    return output, leaf.grad, overwritten


def assert_alike(one: LossOutput, two: LossOutput) -> None:
    for name in ("loss", "num_tokens", "weight", "divergence", "log_prob"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert one.metrics.mean_names == two.metrics.mean_names
    for name in ("means", "maxima", "histogram"):
        assert torch.equal(getattr(one.metrics, name), getattr(two.metrics, name)), name
    assert one.backend == two.backend


@pytest.mark.parametrize("rule", RULES, ids="-".join)
def test_every_rule(rule: tuple[str, str, str], compiled_backend: str) -> None:
    config = dict(zip(("divergence", "direction", "trust_region"), rule, strict=True))
    inputs = make_scenario().inputs("rollout_topk")
    (one, gradient, was_one), (two, expected, was_two) = (
        call(loss_of(compiled_backend, promise, **config), inputs, torch.float32) for promise in (1.0, None)
    )
    assert (was_one, was_two) == (True, False)
    assert_alike(one, two)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_aggregation_with_a_reference_policy_and_another_scale(
    aggregation: str, dtype: torch.dtype, compiled_backend: str
) -> None:
    config = {"aggregation": aggregation, "horizon": 7 if aggregation.endswith("norm") else None, "temperature": 0.7}
    for mask in (make_scenario().loss_mask, None):
        inputs = dataclasses.replace(make_scenario().inputs("ref_log_probs"), loss_mask=mask)
        (one, gradient, was_one), (two, expected, was_two) = (
            call(loss_of(compiled_backend, promise, **config), inputs, dtype, 0.375) for promise in (0.375, None)
        )
        assert (was_one, was_two) == (True, False)
        assert_alike(one, two)
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("why", ["entropy", "kl", "exact", "plain torch", "a leaf"])
def test_two_passes_where_one_cannot_be(why: str, compiled_backend: str) -> None:
    config: dict[str, Any] = {"entropy": {"entropy_coef": 0.1}, "kl": {"kl_coef": 0.1}}.get(why, {})
    if why == "exact":
        config = {"divergence": "exact_tv"}
    scenario = make_scenario()
    inputs = scenario.inputs("ref_log_probs", "rollout_logits")
    loss, without = (loss_of("torch" if why == "plain torch" else compiled_backend, p, **config) for p in (1.0, None))
    if why == "a leaf":
        leaf = scenario.logits.clone().requires_grad_()
        output = loss(leaf, inputs)
        assert torch.equal(leaf, scenario.logits)
        output.loss.backward()
        assert torch.equal(leaf.grad, call(without, inputs, torch.float32)[1])
        return
    (output, gradient, overwritten), (other, expected, _) = (
        call(each, inputs, torch.float32) for each in (loss, without)
    )
    assert not overwritten
    assert_alike(output, other)
    assert torch.equal(gradient, expected)


def test_two_passes_where_every_layout_is_to_give_the_same_bits(compiled_backend: str) -> None:
    loss = DPPOLoss(
        DPPOConfig(),
        vocab_size=VOCAB,
        backend=compiled_backend,
        inplace_backward=True,
        backward_scale=1.0,
        checks="off",
        deterministic="layout",
    )
    leaf = torch.nn.functional.pad(make_scenario().logits, (0, 128 - PADDED)).requires_grad_()  # whole tiles of columns
    logits = leaf * 1
    output = loss(logits, make_scenario().inputs())
    assert torch.equal(logits, leaf)
    output.loss.backward()
    assert leaf.grad.any()


@pytest.mark.emulated_nightly
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")
def test_a_captured_call_makes_two_passes(compiled_backend: str) -> None:
    torch.compiler.reset()
    loss = loss_of(compiled_backend)
    leaf, inputs = make_scenario().logits.clone().requires_grad_(), make_scenario().inputs()
    torch.compile(lambda leaf: loss(leaf * 1, inputs).loss, fullgraph=True, backend="aot_eager")(leaf).backward()
    _, expected, overwritten = call(loss, inputs, torch.float32)
    assert overwritten
    assert torch.equal(leaf.grad, expected)


def test_a_loss_after_it_sees_what_became_of_the_logits(compiled_backend: str) -> None:
    """What reads the logits later gets their gradient: the promise says that nothing does."""
    logits = make_scenario().logits.clone().requires_grad_() * 1
    output = loss_of(compiled_backend)(logits, make_scenario().inputs())
    assert (logits[..., VOCAB:] == 0).all()
    (gradient,) = torch.autograd.grad(output.loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()


def test_a_promise_is_a_number_and_goes_with_logits_that_may_be_overwritten() -> None:
    with pytest.raises(
        ValueError, match=r"backward_scale=1\.0 must be a finite number, and go with inplace_backward=True"
    ):
        DPPOLoss(DPPOConfig(), vocab_size=VOCAB, backward_scale=1.0)
    with pytest.raises(ValueError, match="backward_scale=inf must be a finite number"):
        DPPOLoss(DPPOConfig(), vocab_size=VOCAB, inplace_backward=True, backward_scale=float("inf"))
