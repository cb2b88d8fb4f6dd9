"""The embedded engine on one rank keeps the engines' contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_dppo.distributed.layout import ParallelConfig
from tests.rollout.embedded.embedded_subject import embedded_subject
from tests.rollout.engine_contract import CONTRACT, EngineUnderTest


def _keep_contract(check: Callable[[EngineUnderTest], None], kind: str) -> None:
    check(embedded_subject(kind, ParallelConfig()))


@pytest.mark.parametrize("kind", ["qwen3", "llama_tied", "qwen3_moe"])
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_contract(ranks, check, kind):
    ranks(1).run(_keep_contract, check, kind)
