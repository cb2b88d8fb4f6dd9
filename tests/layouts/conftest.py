"""Tests of several ranks share their processes: importing Megatron-core on each rank takes longer than most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rank_pool import RankPools


@pytest.fixture(scope="package")
def ranks() -> Iterator[RankPools]:
    """As in tests/conftest.py, but for all modules of this folder."""
    pools = RankPools()
    yield pools
    pools.close()
