"""How many operators a call of the loss hands to the device: each costs a GPU some microseconds, whatever its size."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dppo import DPPOConfig, DPPOLoss
from megatron_dppo.ops import logits_route
from tests.loss.scenario import VOCAB, make_scenario

# Backward: three of these are what a policy gradient is multiplied by, and where log pi is -inf.
FORWARD = ["row_partials", "merge_partials", "token_objective", "clone"]
BACKWARD = ["neg", "mul", "eq", "masked_fill", "empty_like", "policy_backward"]
# With the gradient written over the logits in forward: the zero that carries it, and what the promise is held against.
ONE_PASS = ["policy_gradient_", "new_zeros", "token_objective", "add"]
AFTER_IT = ["eq", "_assert_async"]


class Launches(TorchDispatchMode):
    """Names of the operators that are not views of what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, returned = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if not (func.is_view or name in ("detach", "ones_like")):  # the last is backward's own first gradient
            self.names.append(name)
        return returned


@pytest.mark.parametrize("divergence", ["binary_tv", "topk_kl"])
@pytest.mark.parametrize("checks", ["off", "deferred"])
def test_a_call_is_a_handful_of_operators(divergence: str, checks: str, compiled_backend: str) -> None:
    scenario = make_scenario()
    inputs = dataclasses.replace(scenario.inputs("rollout_topk"), loss_mask=scenario.loss_mask.bool())
    loss = DPPOLoss(DPPOConfig(divergence=divergence), vocab_size=VOCAB, backend=compiled_backend, checks=checks)
    logits = scenario.logits.clone().requires_grad_()
    loss(logits, inputs)  # what is looked up once only
    with Launches() as forward:
        output = loss(logits, inputs)
    assert forward.names == (["check_tokens"] if checks == "deferred" else []) + FORWARD
    with Launches() as backward:
        output.loss.backward()
    assert backward.names == BACKWARD


def test_one_pass_is_fewer(compiled_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_route, "_workers", lambda device: (0, float("inf")))
    inputs = dataclasses.replace(make_scenario().inputs(), loss_mask=make_scenario().loss_mask.bool())
    common = {"inplace_backward": True, "backward_scale": 1.0, "checks": "off"}
    loss = DPPOLoss(DPPOConfig(), vocab_size=VOCAB, backend=compiled_backend, **common)
    first, second = (make_scenario().logits.clone().requires_grad_() * 1 for _ in range(2))
    loss(first, inputs)  # what is looked up once only
    with Launches() as forward:
        output = loss(second, inputs)
    assert forward.names == ONE_PASS
    with Launches() as backward:
        torch.autograd.grad(output.loss, second)
    assert backward.names == AFTER_IT


def test_adding_up_a_micro_batch_is_three(compiled_backend: str) -> None:
    scenario = make_scenario()
    loss = DPPOLoss(DPPOConfig(), vocab_size=VOCAB, backend=compiled_backend, checks="off")
    first, second = (loss(scenario.logits, scenario.inputs()).metrics for _ in range(2))
    with Launches() as launches:
        first + second
    assert launches.names == ["add", "maximum", "add"]
