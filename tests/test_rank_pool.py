"""The multi-process test harness itself: results by rank, errors with their traceback, recovery after a failure."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from tests import rank_pool
from tests.rank_pool import RankPool


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


def test_a_rank_that_dies_between_two_runs_is_told_by_its_exit_code():
    pool = RankPool(1)
    pool.run(os.getpid)
    pool.processes[0].kill()
    pool.processes[0].join(timeout=30.0)
    with pytest.raises(
        AssertionError, match=r"^rank 0: the process died \(exit code -9\), before it was given getpid$"
    ):
        pool.run(os.getpid)
    assert pool.run(_sum_of_ranks) == [1.0]
    pool.close()


def test_a_pool_that_threads_have_worn_out_goes_on_with_new_processes(monkeypatch):
    monkeypatch.setattr(rank_pool, "_MOST_THREADS", 0)
    pool = RankPool(1)
    first, second = pool.run(os.getpid), pool.run(os.getpid)  # the same name for it: a caller may hold it over runs
    assert first != second
    pool.close()
