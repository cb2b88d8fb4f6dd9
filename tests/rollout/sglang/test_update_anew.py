"""An update that servers have ended begins anew, on ranks that have finished what they had begun among themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dppo.errors import TransientServerError
from megatron_dppo.models.hf.export import PolicyWeights
from megatron_dppo.rollout.sample import SamplingParams
from megatron_dppo.rollout.sglang.transport import Transport
from tests.models.policy_runs import loaded_policy
from tests.models.tiny_policies import tiny_hf_model, write_tiny_hf_model
from tests.rank_pool import RankPools
from tests.rollout.engine_contract import EngineUnderTest, assert_log_probs_match, make_prompts
from tests.rollout.sglang.conftest import RunningServer

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
FACTOR = 1.01


def _scale(modules: list[torch.nn.Module]) -> None:
    with torch.no_grad():
        for parameter in {id(p): p for module in modules for p in module.parameters()}.values():
            parameter.mul_(FACTOR)


def _lose_a_server_in_between(server: RunningServer, folder: str, colocated: bool, lost_at: int) -> list[Any]:
    """The call for one bucket fails as if its server was gone. Until the next try the weights have changed."""
    chunks = loaded_policy(folder, LAYOUT)
    options: dict[str, Any] = {"colocated": colocated, "bucket_bytes": 16384, "max_senders": 4}
    engine = server.attach(replica_group=dist.group.WORLD, **options)
    request, join, told = Transport.request, engine._join_servers, 0

    async def failing(self: Transport, url: str, path: str, body: Any, timeout_s: float) -> Any:
        nonlocal told
        told += path.startswith("/update_weights")
        if path.startswith("/update_weights") and told == lost_at:
            raise TransientServerError(f"{url} is gone")
        return await request(self, url, path, body, timeout_s)

    def join_servers(*, anew: bool = False) -> None:
        if anew:
            _scale(chunks)
        join(anew=anew)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transport, "request", failing)
        patch.setattr(engine, "_join_servers", join_servers)
        patch.setattr(engine, "_lost_servers", lambda: [server.config.urls[0]])
        engine.update_weights(PolicyWeights(chunks), 1)
    assert told > lost_at or dist.get_rank() > 0
    samples = engine.generate(make_prompts(250, [5, 9]), SamplingParams(max_new_tokens=6, samples_per_prompt=2))
    dist.barrier()
    engine.close()
    return samples


@pytest.mark.parametrize("lost_at", [1, 5])
@pytest.mark.parametrize("colocated", [False, True], ids=["broadcast", "colocated"])
def test_what_is_served_then_is_what_ranks_have_then(
    colocated: bool, lost_at: int, ranks: RankPools, servers, tmp_path
) -> None:
    """The proof would not see it: what a sender has put together, of whatever, is what it hashes."""
    write_tiny_hf_model("qwen3_moe", tmp_path, seed=5)
    samples, *_ = ranks(4).run(
        _lose_a_server_in_between, servers("qwen3_moe"), str(tmp_path), colocated, lost_at, timeout=100.0
    )
    hf_model = tiny_hf_model("qwen3_moe", 5)
    _scale([hf_model])
    assert_log_probs_match(EngineUnderTest(None, hf_model, lambda *_: None), samples, 1.0)
