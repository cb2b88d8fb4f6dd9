"""The SGLang engine, attached to real servers, keeps the engines' contract."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.rollout.engine_contract import CONTRACT, EngineUnderTest
from tests.rollout.sglang.conftest import checkpoint_tensors, tiny_weights

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_tied"])
def subject(request, servers):
    engine = servers(request.param).attach(return_routed_experts=request.param == "qwen3_moe")
    hf_model, tensors = tiny_weights(request.param, seed=0)

    def serve(new_hf_model: torch.nn.Module, version: int) -> None:
        engine.update_weights(WholeWeights(checkpoint_tensors(new_hf_model)), version)

    engine.update_weights(WholeWeights(tensors), 1)
    yield EngineUnderTest(engine, hf_model, serve)
    engine.close()


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_contract(check, subject):
    check(subject)
