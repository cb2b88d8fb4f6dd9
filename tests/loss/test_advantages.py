"""Group advantages."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo import group_advantages

REWARDS = torch.tensor([1.0, 5.0, 0.0, 3.0, 0.5])
GROUPS = torch.tensor([7, 2, 7, 7, 2])  # neither sorted nor contiguous


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
        group_advantages(REWARDS, GROUPS, kind=kind), torch.tensor(expected), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["mean_baseline", "rloo", "grpo"])
@pytest.mark.parametrize("rewards", [torch.full((7,), 0.1, dtype=torch.float64), torch.tensor([0.3])])
def test_a_group_without_a_difference_has_advantage_exactly_zero(kind: str, rewards: torch.Tensor) -> None:
    assert not group_advantages(rewards, torch.zeros(len(rewards), dtype=torch.int64), kind=kind).any()


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="kind must be one of mean_baseline, rloo, grpo"):
        group_advantages(REWARDS, GROUPS, kind="ppo")
    with pytest.raises(ValueError, match="must both be"):
        group_advantages(REWARDS, GROUPS[:3])
    with pytest.raises(ValueError, match="reward 1 is nan"):
        group_advantages(torch.tensor([0.0, float("nan")]), torch.tensor([0, 0]))
