"""Expert choices that SGLang recorded are those of the trainer's routers, and can be replayed there."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.build import build_policy
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.models.hf.weights import load_hf_weights
from megatron_dppo.models.routing_replay import RoutingReplay
from megatron_dppo.rollout.sample import Sample, SamplingParams
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.rollout.engine_contract import make_prompts
from tests.rollout.sglang.conftest import tiny_weights

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


def _replayed(folder: str, samples: list[Sample]) -> tuple[float, float]:
    """(share of choices that the trainer's routers would have made otherwise, largest difference of log-probs)."""
    parallel = ParallelConfig()
    initialize_model_parallel(parallel, seed=1)
    chunks = build_policy(load_hf_config(folder), parallel, torch.float32)
    load_hf_weights(chunks, folder)
    replay, worst = RoutingReplay(chunks), 0.0
    for sample in samples:
        tokens = torch.tensor([sample.token_ids[:-1]])
        with torch.no_grad(), replay.forward_pass(chunks[0], sample.routed_experts[None]):
            logits_SV = chunks[0](tokens, torch.arange(tokens.shape[1])[None], None)[0, :, :250]
        response = torch.tensor(sample.response_ids)
        log_probs = logits_SV[len(sample.prompt.token_ids) - 1 :].log_softmax(-1).gather(-1, response[:, None])[:, 0]
        worst = max(worst, (log_probs - torch.tensor(sample.rollout_log_probs)).abs().max().item())
    return replay.replayed_differently(), worst


def test_in_fp32_server_and_trainer_choose_the_same_experts(servers, ranks):
    server = servers("qwen3_moe")
    engine = server.attach(return_routed_experts=True)
    _, tensors = tiny_weights("qwen3_moe", seed=0)
    engine.update_weights(WholeWeights(tensors), 1)
    prompts = make_prompts(250, [3, 9, 20])
    params = SamplingParams(max_new_tokens=12, samples_per_prompt=4, seed=5, return_routed_experts=True)
    samples = engine.generate(prompts, params)
    engine.close()
    ((differently, worst),) = ranks(1).run(_replayed, str(server.model_folder), samples)
    # 500 choices whose runner-up is some 0.1 away, against 1e-5 of rounding.
    assert differently == 0.0
    assert worst < 2e-5  # see tests/rollout/engine_contract.py


def test_a_server_that_was_not_asked_to_record_is_refused(servers):
    engine = servers("qwen3_moe").attach()
    _, tensors = tiny_weights("qwen3_moe", seed=0)
    engine.update_weights(WholeWeights(tensors), 1)
    with pytest.raises(ValueError, match="return_routed_experts=True"):
        engine.generate(make_prompts(250, [3]), SamplingParams(max_new_tokens=1, return_routed_experts=True))
    engine.close()
