"""KL to a fixed reference policy, estimated at the sampled token."""

from __future__ import annotations

import torch

_LOG_CLAMP = 20.0  # overflow guard for exp()


def reference_kl(log_prob: torch.Tensor, ref_log_prob: torch.Tensor, estimator: str) -> torch.Tensor:
    """[n] estimates of KL(pi || ref) whose gradient is the one to descend.

    With d = log pi - log ref (Schulman, "Approximating KL divergence"):

    * k1: value d. Its own gradient, grad(log pi), is 0 in expectation, i.e. noise. The gradient here is the
      score-function one, d * grad(log pi), whose expectation under pi is the gradient of KL(pi || ref).
    * k2: value d^2 / 2; its own gradient is that same d * grad(log pi).
    * k3: value exp(-d) - 1 + d, never negative; its own gradient (1 - exp(-d)) * grad(log pi), as in GRPO. In
      expectation under pi that is the gradient of KL(ref || pi), and the same as k1's and k2's to first order in d.

    Tokens are weighted as sampled, without importance weights.
    """
    difference = log_prob - ref_log_prob
    if estimator == "k1":
        return difference.detach() * (1.0 + differentiable_zero(log_prob))
    if estimator == "k2":
        return 0.5 * difference.square()
    return torch.exp((-difference).clamp(max=_LOG_CLAMP)) - 1.0 + difference


def differentiable_zero(log_prob: torch.Tensor) -> torch.Tensor:
    """0 with the gradient of ``log_prob``, so that a coefficient can be given a gradient without changing the value.

    Where log_prob is -inf the gradient is 0: the policy gives that token no probability that an update could scale.
    """
    finite = torch.where(log_prob == -torch.inf, 0.0, log_prob)
    return finite - finite.detach()
