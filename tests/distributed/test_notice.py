"""What one rank says is read by all, and the first word stays."""

from __future__ import annotations

import torch.distributed as dist

from megatron_dppo.distributed.notice import Notice
from tests.rank_pool import RankPools


def _leave_and_read() -> list[str | None]:
    notice, other = Notice("test"), Notice("another")
    dist.barrier()
    read = [notice.read()]
    dist.barrier()
    if dist.get_rank() == 1:
        notice.leave("first")
        notice.leave("second")
    dist.barrier()
    return [*read, notice.read(), other.read()]


def test_a_word_of_one_rank_is_read_by_all(ranks: RankPools) -> None:
    assert ranks(2).run(_leave_and_read) == [[None, "first", None]] * 2
