"""The group by which weights reach servers has one rank of the trainer's: it must need none of the others."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore, distributed_c10d

from megatron_dppo.rollout.sglang.update_group import join_update_group


def _made_by_one_rank() -> tuple[int, str]:
    """On rank 0, whose default group is bound to its device as NCCL's is."""
    default, device = dist.group.WORLD, torch.device("cuda", 0)
    if dist.get_rank() > 0:
        return 0, ""
    default.bound_device_id = device
    looked_for: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_c10d, "_get_split_source", looked_for.append)
        store = TCPStore("127.0.0.1", 0, 1, is_master=True)
        group = join_update_group("weights", store, 1, "gloo", timedelta(seconds=30))
    assert looked_for == [], "the group would be split off the default one, for which all of its ranks are needed"
    bound = str(default.bound_device_id)
    default.bound_device_id = None
    return group.size(), bound


def test_the_group_is_not_split_off_the_trainers_own(ranks):
    first, _ = ranks(2).run(_made_by_one_rank)
    assert first == (1, "cuda:0")
