"""Small pieces of log-probability arithmetic that stay accurate, and finite, at certainty."""

from __future__ import annotations

import math

import torch

# Stands in for log(0). Far below any log-prob that real logits produce, yet finite: 0 * LOG_ZERO is 0, not NaN.
LOG_ZERO = -1e5


def log1mexp(log_p: torch.Tensor) -> torch.Tensor:
    """``log(1 - exp(log_p))`` for log_p <= 0, accurate at both ends; at p = 1, log of the smallest normal number.

    Mächler, "Accurately computing log(1 - exp(-|a|))": which of the two forms keeps its digits changes at p = 1/2.
    """
    near_one = log_p > -math.log(2.0)
    log_complement = torch.where(near_one, torch.log(-torch.expm1(log_p)), torch.log1p(-log_p.exp()))
    return log_complement.clamp(min=math.log(torch.finfo(log_p.dtype).tiny))


def remaining_mass(log_prob_nS: torch.Tensor, valid_nS: torch.Tensor) -> torch.Tensor:
    """[n] probability that the valid slots of each row leave over: ``1 - sum of their probabilities``, never negative.

    The largest is taken through expm1, so a peaked row keeps the digits of a small rest that ``1 - sum`` would lose. What
    the others' rounding hides is not called 0: there would then be no bound on a KL that divides by it.
    """
    log_prob_nS = log_prob_nS.masked_fill(~valid_nS, -torch.inf)
    largest_n1, at_n1 = log_prob_nS.max(dim=1, keepdim=True)
    others_n = log_prob_nS.exp().scatter(1, at_n1, 0.0).sum(dim=1)
    return torch.maximum(-torch.expm1(largest_n1[:, 0]) - others_n, torch.finfo(others_n.dtype).eps * others_n)
