"""The tiny models are fit for the tests that use them: a wrong weight anywhere shows."""

from __future__ import annotations

import pytest
import torch

from tests.models.policy_runs import example_tokens
from tests.models.tiny_policies import KINDS, tiny_hf_model


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_moves_the_logits_by_far_more_than_rounding_does(kind: str) -> None:
    model, tokens = tiny_hf_model(kind), example_tokens()
    with torch.no_grad():
        reference = model(tokens).logits
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                continue  # Before rotation it adds the same to every score of a query; what is left is small.
            original = parameter.clone()
            # Noise, not a factor: query and key norms undo a factor.
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape))
            moved = (model(tokens).logits - reference).abs().max() / reference.abs().max()
            parameter.copy_(original)
            assert moved > 1e-3, name  # 100 times the relative tolerance of the comparisons
