"""How the embedded engine draws a token: from softmax(logits / temperature) over the true vocabulary, untruncated.

A token is drawn by inverting the cumulative distribution at one uniform number per row. The numbers are drawn up front
per response, so a response does not depend on which others share its batch or have already ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draw:
    """One token per row and what is recorded of the distribution it came from.

    Attributes:
        token_ids: [B] int64.
        log_probs: [B] fp32 log-probability of each drawn token.
        topk_ids: [B, K] int64, most likely first; K may be 0.
        topk_log_probs: [B, K] fp32.
    """

    token_ids: torch.Tensor
    log_probs: torch.Tensor
    topk_ids: torch.Tensor
    topk_log_probs: torch.Tensor


def draw_tokens(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, vocab_size: int, topk: int
) -> Draw:
    """Draw one token per row.

    Args:
        logits_BV: [B, V padded], any float dtype; columns from ``vocab_size`` on are padding and never drawn.
        uniform_B: [B] fp64 in [0, 1), one number per row; unused if ``temperature`` is 0.
        temperature: divides the logits; 0 takes the most likely token and reports log-probs of softmax(logits).
        vocab_size: true size of the vocabulary.
        topk: how many of the most likely tokens to report.
    """
    logits_BV = logits_BV[:, :vocab_size].float()
    if temperature not in (0.0, 1.0):
        logits_BV = logits_BV / temperature
    log_probs_BV = torch.log_softmax(logits_BV, dim=-1)
    if temperature == 0.0:
        token_ids = log_probs_BV.argmax(dim=-1)
    else:
        token_ids = _invert_cumulative(log_probs_BV.exp(), uniform_B)
    log_probs = log_probs_BV.gather(-1, token_ids[:, None])[:, 0]
    topk_log_probs, topk_ids = log_probs_BV.topk(topk, dim=-1)
    return Draw(token_ids, log_probs, topk_ids, topk_log_probs)


def _invert_cumulative(probs_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """[B] smallest id whose cumulative probability exceeds the row's uniform number."""
    # fp64: summed in fp32, 150k terms would move the boundaries of rare tokens by more than those tokens' probability.
    cumulative_BV = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    # Scaling by the last entry makes the row sum to exactly one; right=True never lands on a token of probability zero.
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    ids = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
    return ids.clamp_(max=probs_BV.shape[-1] - 1)
