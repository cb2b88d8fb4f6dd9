"""One call of the loss is one graph: torch.compile sees through it, whatever computes it, and gets the same numbers."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LinearHead
from tests.loss.scenario import BATCH, LENGTH, PADDED, VOCAB, make_scenario


@pytest.mark.emulated_nightly
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")  # a table of places, the same at each call
@pytest.mark.parametrize(
    ("entrance", "penalty"),
    [
        ("logits", 0.1),
        pytest.param("hidden", 0.1, marks=pytest.mark.nightly),
        pytest.param("hidden", 0.0, marks=pytest.mark.nightly),  # the gradient is made in forward
    ],
)
def test_a_call_is_captured_whole(entrance: str, penalty: float, backend: str) -> None:
    scenario = make_scenario()
    inputs = scenario.inputs("rollout_topk", "ref_log_probs")
    config = DPPOConfig(divergence="topk_kl", entropy_coef=penalty, kl_coef=penalty)
    loss = DPPOLoss(config, vocab_size=VOCAB, backend=backend, checks="off")
    weight = torch.randn(PADDED, 8)

    def call(leaf: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = loss(LinearHead(leaf, weight) if entrance == "hidden" else leaf, inputs)
        return output.loss, output.num_tokens, output.weight, output.divergence, output.metrics.means

    leaf = scenario.logits.clone() if entrance == "logits" else torch.randn(BATCH, LENGTH, 8)
    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf.grad = None
        values = function(leaf.requires_grad_())
        values[0].backward()
        results.append([*(value.detach() for value in values), leaf.grad])
    for eager, captured in zip(*results, strict=True):
        assert torch.equal(eager, captured)
