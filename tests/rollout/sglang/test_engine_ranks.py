"""The engine on several trainer ranks: one owner of the servers, one leader per replica, an update that all agree on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_dppo.errors import RolloutError, WeightSyncError
from megatron_dppo.rollout.sample import FailedSample, SamplingParams
from megatron_dppo.rollout.sglang import SGLangEngine
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.rollout.engine_contract import make_prompts
from tests.rollout.sglang.conftest import RunningServer, tiny_weights

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


def _engine(server: RunningServer, **layout: object) -> SGLangEngine:
    return SGLangEngine(
        server.config, server.model_folder, vocab_size=250, dtype=torch.float32, log_folder=server.log_folder, **layout
    )


def _tensors() -> dict[str, torch.Tensor]:
    """Made outside the ranks: transformers saves a checkpoint on the first rank only."""
    return tiny_weights("qwen3_moe", seed=0)[1]


def _generate_as_one_replica(server: RunningServer, tensors: dict[str, torch.Tensor]) -> list[list[int]]:
    engine = _engine(server, replica_group=dist.group.WORLD)
    engine.update_weights(WholeWeights(tensors), version=1)
    samples = engine.generate(make_prompts(250, [4, 7]), SamplingParams(max_new_tokens=5, samples_per_prompt=2))
    engine.health()
    engine.close()
    return [sample.response_ids for sample in samples]


def test_the_first_rank_of_a_replica_gets_its_samples(ranks, servers):
    first, second = ranks(2).run(_generate_as_one_replica, servers("qwen3_moe"), _tensors())
    assert [len(response_ids) for response_ids in first] == [5] * 4
    assert second == []


def _generate_as_two_replicas(server: RunningServer, tensors: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    engine = _engine(server, replica_group=groups[dist.get_rank()])
    engine.update_weights(WholeWeights(tensors), version=1)
    prompts = make_prompts(250, [3 + dist.get_rank()] * 2, seed=dist.get_rank())
    samples = engine.generate(prompts, SamplingParams(max_new_tokens=5))
    dist.barrier()
    engine.close()
    assert [sample.prompt for sample in samples] == prompts
    return [sample.prompt.token_ids for sample in samples]


def test_each_replica_generates_for_its_own_prompts(ranks, servers):
    first, second = ranks(2).run(_generate_as_two_replicas, servers("qwen3_moe"), _tensors())
    assert first != second


def _fail_on_all_ranks(server: RunningServer, tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    engine = _engine(server, replica_group=dist.group.WORLD)
    del tensors["model.norm.weight"]
    with pytest.raises(WeightSyncError) as missing:
        engine.update_weights(WholeWeights(tensors), version=1)
    with pytest.raises(RolloutError) as unusable:
        engine.generate(make_prompts(250, [4]), SamplingParams(max_new_tokens=2))
    engine.close()

    return str(missing.value), str(unusable.value)


def _ask_for_too_much(server: RunningServer, tensors: dict[str, torch.Tensor]) -> list[str]:
    engine = _engine(server)
    engine.update_weights(WholeWeights(tensors), version=1)
    # 400 tokens are more than the model has positions for.
    samples = engine.generate(make_prompts(250, [4]), SamplingParams(max_new_tokens=400, samples_per_prompt=2))
    engine.close()
    return [sample.reason for sample in samples if isinstance(sample, FailedSample)]


def test_what_the_server_refuses_is_a_failed_sample(ranks, servers):
    (reasons,) = ranks(1).run(_ask_for_too_much, servers("qwen3_moe"), _tensors())
    assert len(reasons) == 2
    assert all("maximum context length" in reason for reason in reasons)


def test_an_update_that_fails_on_one_rank_fails_on_all(ranks, servers):
    outcomes = ranks(2).run(_fail_on_all_ranks, servers("qwen3_moe"), _tensors())
    assert outcomes[0] == outcomes[1]
    assert "model.norm.weight was never sent" in outcomes[0][0]
