"""What a valid choice of experts is: wherever one is recorded, received or replayed."""

from __future__ import annotations

import torch


def is_invalid_choice(experts: torch.Tensor, num_experts: int | None = None) -> torch.Tensor:
    """[..., k] integers -> [...] bool: True where they are not k different experts (of ``num_experts``, if given)."""
    in_order = experts.sort(dim=-1).values
    invalid = (in_order[..., 0] < 0) | (in_order.diff(dim=-1) == 0).any(dim=-1)
    return invalid if num_experts is None else invalid | (in_order[..., -1] >= num_experts)
