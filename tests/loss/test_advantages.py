"""Group advantages."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo import group_advantages


def rewards_and_groups() -> tuple[torch.Tensor, torch.Tensor]:
    """Two groups, neither sorted nor contiguous."""
    return torch.tensor([1.0, 5.0, 0.0, 3.0, 0.5]), torch.tensor([7, 2, 7, 7, 2])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mean_baseline", [1 - 4 / 3, 2.25, -4 / 3, 3 - 4 / 3, -2.25]),
        ("rloo", [1 - 1.5, 4.5, 0 - 2.0, 3 - 0.5, -4.5]),
        # sample standard deviations: sqrt(7/3) and 4.5/sqrt(2)
        ("grpo", [-1 / 3 / (7 / 3) ** 0.5, 0.5**0.5, -4 / 3 / (7 / 3) ** 0.5, 5 / 3 / (7 / 3) ** 0.5, -(0.5**0.5)]),
    ],
)
def test_advantages_by_hand(kind: str, expected: list[float]) -> None:
    torch.testing.assert_close(
        group_advantages(*rewards_and_groups(), kind=kind), torch.tensor(expected), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["mean_baseline", "rloo", "grpo"])
@pytest.mark.parametrize(("reward", "size", "dtype"), [(0.1, 7, torch.float64), (0.3, 1, torch.float32)])
def test_a_group_without_a_difference_has_advantage_exactly_zero(
    kind: str, reward: float, size: int, dtype: torch.dtype
) -> None:
    rewards = torch.full((size,), reward, dtype=dtype)
    assert not group_advantages(rewards, torch.zeros(len(rewards), dtype=torch.int64), kind=kind).any()


def test_wrong_inputs_are_named() -> None:
    rewards, groups = rewards_and_groups()
    with pytest.raises(ValueError, match="kind must be one of mean_baseline, rloo, grpo"):
        group_advantages(rewards, groups, kind="ppo")
    with pytest.raises(ValueError, match="must both be"):
        group_advantages(rewards, groups[:3])
    with pytest.raises(ValueError, match="reward 1 is nan"):
        group_advantages(torch.tensor([0.0, float("nan")]), torch.tensor([0, 0]))
