"""One call of the loss is one graph: torch.compile sees through it, whatever computes it, and gets the same numbers."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LinearHead, LossInputs
from megatron_dppo.loss.inputs import TopK
from tests.loss.scenario import BATCH, LENGTH, PADDED, VOCAB, make_scenario


@pytest.fixture(autouse=True)
def _nothing_captured_before() -> None:
    """Dynamo captures one piece of code eight times at most, and these tests share one."""
    torch.compiler.reset()


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


class _Call(torch.nn.Module):
    """Tensors in, tensors out, as torch.export asks for."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.loss = DPPOLoss(DPPOConfig(divergence="topk_kl"), vocab_size=VOCAB, backend=backend, checks="off")

    def forward(self, logits: torch.Tensor, *fields: torch.Tensor) -> tuple[torch.Tensor, ...]:
        target, mask, advantages, rollout_log_probs, ids, log_probs = fields
        inputs = LossInputs(
            target=target,
            loss_mask=mask,
            advantages=advantages,
            rollout_log_probs=rollout_log_probs,
            rollout_topk=TopK(ids=ids, log_probs=log_probs),
        )
        output = self.loss(logits, inputs)
        return output.loss, output.num_tokens, output.weight, output.divergence, output.metrics.means


@pytest.mark.emulated_nightly
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")
def test_a_call_is_exported_by_the_kernels_for_any_number_of_tokens(backend: str) -> None:
    scenario = make_scenario()
    inputs = scenario.inputs("rollout_topk").take(torch.arange(BATCH * LENGTH))
    topk = inputs.rollout_topk
    fields = (inputs.target, inputs.loss_mask, inputs.advantages, inputs.rollout_log_probs, topk.ids, topk.log_probs)
    arguments = (scenario.logits.detach().flatten(0, 1), *fields)
    call, tokens = _Call(backend), torch.export.Dim("tokens", min=2, max=2**20)
    # Plain torch goes through the tokens in blocks, so that a graph of it has a number of them.
    any_number = {"logits": {0: tokens}, "fields": ({0: tokens},) * len(fields)} if backend != "torch" else None
    exported = torch.export.export(call, arguments, dynamic_shapes=any_number)
    for n in (BATCH * LENGTH, 5)[: 1 if any_number is None else 2]:
        some = [values[:n] for values in arguments]
        for eager, captured in zip(call(*some), exported.module()(*some), strict=True):  # eager: nothing stays behind
            assert torch.equal(eager, captured)
