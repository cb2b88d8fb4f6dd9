"""The policy statistics written down densely in float64, and the call that is compared with them."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dppo import PolicyStats, vocab_parallel_policy_stats


def dense(logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> PolicyStats:
    """The definition, in float64."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    p = log_p.exp()
    return PolicyStats(
        log_p.gather(-1, target[..., None])[..., 0],
        -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        p.square().sum(-1),
        log_p.gather(-1, ids),
    )


def stats_of(
    backend: str, logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor | None = None, **kw: Any
) -> PolicyStats:
    return vocab_parallel_policy_stats(logits, target, topk_ids=ids, backend=backend, **kw)
