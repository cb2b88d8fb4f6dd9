"""Every probability of a row is measured from its largest logit: dividing by the temperature and back must not move that."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron_dppo.ops.native_backend", reason="the extension megatron_dppo._C is not built")
from megatron_dppo.ops.exact_divergence import vocab_parallel_divergence
from megatron_dppo.ops.policy_stats import vocab_parallel_policy_stats

TIES = 4


def tied(dtype: torch.dtype, magnitude: float) -> torch.Tensor:
    """[64, 2 TIES] of which the first TIES of a row share the largest logit, and the others have no probability beside it."""
    largest = (magnitude * (0.5 + 0.5 * torch.rand(64, 1))).to(dtype)
    return torch.cat([largest.expand(64, TIES), -largest.expand(64, TIES)], dim=1)


# Where a unit in the last place of fp32 is large enough to be seen in a gradient of that dtype.
@pytest.mark.parametrize(("dtype", "magnitude"), [(torch.bfloat16, 3e6), (torch.float16, 6e4)])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_equal_logits_have_equal_probability(
    dtype: torch.dtype, magnitude: float, temperature: float, compiled_backend: str
) -> None:
    logits = tied(dtype, magnitude).requires_grad_()
    target = torch.zeros(64, dtype=torch.int64)
    common = {"temperature": temperature, "backend": compiled_backend, "checks": "off"}
    vocab_parallel_policy_stats(logits, target, **common).log_prob.sum().backward()
    # One rounding to the dtype, and a few of fp32.
    expected = torch.tensor(-1 / TIES / temperature).expand(64, TIES - 1)
    torch.testing.assert_close(
        logits.grad[:, 1:TIES].float(), expected, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=0.0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_exact_divergence_of_equal_logits_is_exact(dtype: torch.dtype, compiled_backend: str) -> None:
    """D(mu || pi) where mu has half of pi's TIES tokens: 1/2 in total variation, log 2 in KL."""
    policy = tied(dtype, 1e4)
    rollout = policy.clone()
    rollout[:, : TIES // 2] = -policy[:, : TIES // 2]
    common = {"temperature": 0.7, "backend": compiled_backend, "checks": "off"}
    for kind, expected in (("tv", 0.5), ("kl", 0.69314718)):
        found = vocab_parallel_divergence(policy, rollout, kind=kind, **common)
        torch.testing.assert_close(found, torch.full((64,), expected), rtol=4e-6, atol=0.0)
