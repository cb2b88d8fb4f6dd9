"""The loss from hidden states is the loss from the logits that the output layer would have made of them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LinearHead
from megatron_dppo.errors import LossInputError
from megatron_dppo.ops import linear_route
from tests.loss.scenario import BATCH, LENGTH, PADDED, VOCAB, make_scenario

HIDDEN = 16
ENGINE = ("rollout_topk", "ref_log_probs")


def output_layer() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(BATCH, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64) / 2
    return hidden.requires_grad_(), weight.requires_grad_()


def names_of_graph(loss: torch.Tensor) -> set[str]:
    """Of the operations that backward goes through."""
    names, found = set(), [loss.grad_fn]
    while found:
        node = found.pop()
        names.add(node.name())
        found += [following for following, _ in node.next_functions if following is not None]
    return names


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "topk_kl", "direction": "predictive", "entropy_coef": 0.1, "temperature": 0.8},
        {"trust_region": "smooth", "aggregation": "seq_mean_token_mean", "kl_coef": 0.1},
        {"divergence": "topk_tv", "direction": "predictive", "aggregation": "seq_mean_token_mean"},
    ],
)
@pytest.mark.parametrize("block_rows", [None, 5])
def test_it_is_the_loss_of_the_logits(settings: dict[str, Any], block_rows: int | None) -> None:
    """In two passes where there are penalties, else with the gradient made in forward, in one block or several."""
    inputs = make_scenario().inputs(*ENGINE)
    loss = DPPOLoss(DPPOConfig(**settings), vocab_size=VOCAB)
    hidden, weight = output_layer()
    from_logits = loss(hidden @ weight.t(), inputs)
    expected = torch.autograd.grad(from_logits.loss, (hidden, weight))
    with (
        mock.patch.object(linear_route, "_FEWEST_ROWS", {"cpu": 1}),
        mock.patch.object(linear_route, "_FEWEST_ROWS_ELSEWHERE", 1),
    ):
        chunk_bytes = None if block_rows is None else block_rows * PADDED * 8
        from_hidden = loss(LinearHead(hidden, weight, chunk_bytes=chunk_bytes), inputs)
    penalties = {"entropy_coef", "kl_coef"} & settings.keys()
    assert any("GradientInForward" in name for name in names_of_graph(from_hidden.loss)) == (not penalties)
    got = torch.autograd.grad(from_hidden.loss, (hidden, weight))
    # float64 throughout: sums of a few hundred terms in another order.
    torch.testing.assert_close(from_hidden.loss, from_logits.loss, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert from_hidden.metrics.mean_names == from_logits.metrics.mean_names
    torch.testing.assert_close(from_hidden.metrics.means, from_logits.metrics.means, rtol=1e-10, atol=1e-12)
    assert torch.equal(from_hidden.weight != 0, from_logits.weight != 0)
    assert from_hidden.backend == from_logits.backend == "torch"


def test_a_divergence_over_all_logits_is_refused() -> None:
    hidden, weight = output_layer()
    with pytest.raises(LossInputError, match="'exact_tv' compares whole distributions and needs logits"):
        DPPOLoss(DPPOConfig(divergence="exact_tv"), vocab_size=VOCAB)(
            LinearHead(hidden, weight), make_scenario().inputs()
        )


def test_shapes_are_those_of_the_hidden_states() -> None:
    hidden, weight = output_layer()
    with pytest.raises(LossInputError, match=r"loss_mask has shape \(3, 8\); the policy's output asks for \(3, 7\)"):
        DPPOLoss(DPPOConfig(), vocab_size=VOCAB)(LinearHead(hidden[:, 1:], weight), make_scenario().inputs())
