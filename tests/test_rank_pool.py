"""The multi-process test harness itself: results by rank, errors with their traceback, recovery after a failure."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist


def _sum_of_ranks() -> float:
    x = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(x)
    return x.item()


def _fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def test_ranks_share_a_process_group_and_survive_a_failed_test(ranks):
    assert ranks(2).run(_sum_of_ranks) == [3.0, 3.0]
    with pytest.raises(AssertionError, match="the reason"):
        ranks(2).run(_fail_on_rank_1, timeout=5.0)
    assert ranks(2).run(_sum_of_ranks) == [3.0, 3.0]
