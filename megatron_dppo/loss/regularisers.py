"""Per-token terms of the loss as autograd sees them: values with the gradient of a score, and KL to a fixed reference."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

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
        return scored(difference.detach(), log_prob)
    if estimator == "k2":
        return 0.5 * difference.square()
    return torch.exp((-difference).clamp(max=_LOG_CLAMP)) - 1.0 + difference


def scored(values: torch.Tensor, log_prob: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """[n] ``scale * values``, constants, with the gradient ``scale * values * grad(log_prob)``.

    Where log_prob is -inf the gradient is 0: the policy gives that token no probability that an update could scale.
    """
    result: torch.Tensor = _Scored.apply(values, log_prob, scale)
    return result


def policy_loss(loss: torch.Tensor, coefficient: torch.Tensor, log_prob: torch.Tensor) -> torch.Tensor:
    """``loss``, the sum of ``-coefficient`` [n], with the gradient of the sum of ``scored(coefficient, log_prob, -1.0)``."""
    result: torch.Tensor = _PolicyLoss.apply(loss, coefficient, log_prob)
    return result


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, coefficient: torch.Tensor, log_prob: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(coefficient, log_prob)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        coefficient, log_prob = ctx.saved_tensors
        return None, None, (coefficient * -grad).masked_fill(log_prob == -torch.inf, 0.0).to(log_prob.dtype)


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, log_prob: torch.Tensor, scale: float) -> torch.Tensor:
        result = values * scale
        ctx.save_for_backward(result, log_prob)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        result, log_prob = ctx.saved_tensors
        return None, (grad * result).masked_fill(log_prob == -torch.inf, 0.0).to(log_prob.dtype), None
