"""A weight update either makes the servers serve exactly what was exported, or fails and names the tensor."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo.errors import RolloutError, WeightSyncError
from megatron_dppo.rollout.sample import FailedSample, SamplingParams
from megatron_dppo.rollout.sglang import broadcast_route
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.rollout.engine_contract import EngineUnderTest, assert_log_probs_match, make_prompts
from tests.rollout.sglang.conftest import tiny_weights

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


@pytest.fixture(params=["qwen3_moe", "qwen3_tied"])
def server(request, servers):
    return servers(request.param)


def _assert_serves(engine, hf_model) -> None:
    samples = engine.generate(make_prompts(250, [5, 9]), SamplingParams(max_new_tokens=6, samples_per_prompt=2))
    assert_log_probs_match(EngineUnderTest(engine, hf_model, lambda *_: None), samples, 1.0)


def test_new_weights_are_served_in_one_or_many_buckets(server):
    for seed, bucket_bytes in ((1, 512 * 2**20), (2, 8192)):
        engine = server.attach(bucket_bytes=bucket_bytes)
        hf_model, tensors = tiny_weights(server.kind, seed)
        engine.update_weights(WholeWeights(tensors), version=seed)
        assert engine.weight_version == seed
        _assert_serves(engine, hf_model)
        engine.close()


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
DENSE = "model.layers.1.mlp.up_proj.weight"


def _victims(kind: str) -> list[str]:
    return ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", EXPERT if "moe" in kind else DENSE]


def _assert_update_fails(server, tensors, *names: str) -> None:
    """The update raises, naming the tensors; the engine is unusable from then on and a fresh engine can repair the server."""
    engine = server.attach()
    with pytest.raises(WeightSyncError) as raised:
        engine.update_weights(WholeWeights(tensors), version=7)
    for name in names:
        assert name in str(raised.value)
    assert "model.layers.0.input_layernorm.weight" not in str(raised.value), "a healthy tensor was blamed"
    with pytest.raises(RolloutError, match="weight update to version 7 failed"):
        engine.generate(make_prompts(250, [4]), SamplingParams(max_new_tokens=2))
    with pytest.raises(RolloutError, match="weight update to version 7 failed"):
        engine.update_weights(WholeWeights(tensors), version=8)
    engine.close()


def test_a_corrupted_tensor_is_detected_and_named(server, monkeypatch):
    _, tensors = tiny_weights(server.kind, seed=3)
    intact = broadcast_route.flatten
    for victim in _victims(server.kind):

        def flip_one_bit(parts, buffer, victim=victim):
            flat, offset = intact(parts, buffer), 0
            for part in parts:
                if part.shape == tensors[victim].shape and torch.equal(part, tensors[victim]):
                    flat[offset + part.nbytes // 2] ^= 1
                offset += part.nbytes
            return flat

        monkeypatch.setattr(broadcast_route, "flatten", flip_one_bit)
        # The server keeps all experts of a layer in one parameter, so its checksum cannot tell which of them is wrong.
        blamed = "model.layers.1.mlp.experts.w13_weight" if victim == EXPERT else victim
        _assert_update_fails(server, tensors, blamed)


def test_a_misnamed_tensor_is_detected_and_named(server):
    """Some models skip a name that they do not know without a word, others refuse it."""
    for victim in _victims(server.kind):
        _, tensors = tiny_weights(server.kind, seed=3)
        wrong = victim.replace("model.", "model.decoder.", 1)
        renamed = {wrong if name == victim else name: tensor for name, tensor in tensors.items()}
        _assert_update_fails(server, renamed, wrong)


def test_a_missing_tensor_is_detected_and_named(server):
    for victim in _victims(server.kind):
        _, tensors = tiny_weights(server.kind, seed=3)
        del tensors[victim]
        _assert_update_fails(server, tensors, victim)


class BreaksHalfWay(WholeWeights):
    def fetch(self, *buckets, **options):
        yield next(super().fetch(*buckets, **options))
        raise OSError("the disk is gone")


def test_an_exporter_that_fails_leaves_the_engine_unusable_and_a_new_one_repairs_the_server(server):
    hf_model, tensors = tiny_weights(server.kind, seed=4)

    engine = server.attach(bucket_bytes=8192)
    with pytest.raises(WeightSyncError, match="the disk is gone"):
        engine.update_weights(BreaksHalfWay(tensors), version=1)
    with pytest.raises(RolloutError, match="the disk is gone"):
        engine.generate(make_prompts(250, [4]), SamplingParams(max_new_tokens=2))
    engine.close()

    engine = server.attach()
    engine.update_weights(WholeWeights(tensors), version=1)
    _assert_serves(engine, hf_model)
    engine.close()


def test_nothing_is_generated_before_the_first_update(server):
    engine = server.attach()
    with pytest.raises(RolloutError, match="call update_weights before generating"):
        engine.generate(make_prompts(250, [4]), SamplingParams(max_new_tokens=2))
    engine.close()


def test_weights_changed_behind_the_engines_back_are_noticed(server):
    _, tensors = tiny_weights(server.kind, seed=0)
    engine, other = server.attach(), server.attach()
    engine.update_weights(WholeWeights(tensors), version=1)
    other.update_weights(WholeWeights(tensors), version=2)
    (failed,) = engine.generate(make_prompts(250, [4]), SamplingParams(max_new_tokens=2))
    assert isinstance(failed, FailedSample)
    assert "drawn by weights version '2', but version 1 was the last one sent" in failed.reason
    engine.close()
    other.close()
