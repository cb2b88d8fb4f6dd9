"""Rewards of a group of responses to one prompt -> advantages."""

from __future__ import annotations

import torch

ADVANTAGE_KINDS = ("mean_baseline", "rloo", "grpo")
_GRPO_EPSILON = 1e-6  # as in GRPO's implementations; keeps a group of nearly equal rewards from blowing up


def group_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, *, kind: str = "mean_baseline") -> torch.Tensor:
    """Advantage of each response over its group.

    Args:
        rewards: [n] floating point, finite.
        group_ids: [n] integers; responses with the same id answer the same prompt.
        kind: ``mean_baseline`` reward - mean of the group (the DPPO paper's); ``rloo`` reward - mean of the *other*
            responses (Ahmadian et al., 2402.14740); ``grpo`` mean_baseline divided by the group's standard deviation
            (Shao et al., 2402.03300).

    Returns:
        [n] fp32. A group whose rewards are all equal, or of one response, has advantages of exactly 0.

    Raises:
        ValueError: unknown kind, shapes that differ, or a reward that is NaN or infinite.
    """
    if kind not in ADVANTAGE_KINDS:
        raise ValueError(f"kind must be one of {', '.join(ADVANTAGE_KINDS)}, not {kind!r}")
    if rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must both be [n]")
    if not bool(rewards.isfinite().all()):
        first = int((~rewards.isfinite()).nonzero()[0, 0])
        raise ValueError(f"reward {first} is {float(rewards[first])}: rewards must be finite")
    if rewards.numel() == 0:
        return rewards.float()
    rewards = rewards.double()
    group, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)[1:]
    zeros = rewards.new_zeros(counts.shape[0])
    mean = zeros.scatter_add(0, group, rewards) / counts
    difference = rewards - mean[group]

    smallest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    largest = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
    # Exactly 0, not rounding noise: tokens with A = 0 must stay out of every trust-region statistic.
    difference = difference.masked_fill((smallest == largest)[group], 0.0)

    others = (counts - 1).clamp(min=1)[group]
    if kind == "rloo":
        difference = difference * counts[group] / others
    elif kind == "grpo":
        variance = zeros.scatter_add(0, group, difference.square())[group] / others
        difference = difference / (variance.sqrt() + _GRPO_EPSILON)
    return difference.float()
