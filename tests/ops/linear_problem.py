"""Arguments for what computes from hidden states and an output layer's weight."""

from __future__ import annotations

from typing import Any

import torch


def problem(
    n: int = 13, h: int = 24, width: int = 40, vocab: int = 37, k: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Hidden states [n, h], weight [width, h] with padded rows that must not count, targets, ids, a mask."""
    weight = torch.randn(width, h) * 3 / h**0.5
    weight[vocab:] = 7.0
    return {
        "hidden": torch.randn(n, h).to(dtype),
        "weight": weight.to(dtype),
        "target": torch.randint(0, vocab, (n,)),
        "topk_ids": torch.randint(0, vocab, (n, k)) if k else None,
        "temperature": 0.7,
        "vocab_size": vocab,
        "token_mask": torch.rand(n) < 0.7,
    }
