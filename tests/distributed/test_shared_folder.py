"""A folder that is another one on some node is refused by all ranks before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_dppo.distributed import shared_folder
from megatron_dppo.distributed.shared_folder import check_shared_folder
from megatron_dppo.errors import ConfigError
from tests.rank_pool import RankPools


def _check(folders: list[Path]) -> str | None:
    """On a rank, which is a node of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        patch.setattr(shared_folder, "_PATIENCE_S", 1.0)
        patch.setattr(shared_folder.socket, "gethostname", lambda: f"node{dist.get_rank()}")
        try:
            check_shared_folder(folders[dist.get_rank()], "run.root")
        except ConfigError as error:
            return str(error)
    return None


def test_a_shared_folder_is_fine_and_left_as_it_was(ranks: RankPools, tmp_path: Path) -> None:
    assert ranks(2).run(_check, [tmp_path, tmp_path]) == [None, None]
    assert list(tmp_path.iterdir()) == []


def test_a_node_with_a_folder_of_its_own_is_named_on_all_ranks(ranks: RankPools, tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    first, second = ranks(2).run(_check, folders)
    for message in (first, second):
        assert "run.root" in message
        assert "node1 did not see" in message
    assert list(folders[0].iterdir()) == []
