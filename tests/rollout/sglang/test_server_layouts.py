"""Servers that divide the model in other ways than by tensor parallelism are updated and verified like all others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_dppo.errors import WeightSyncError
from megatron_dppo.rollout.sample import SamplingParams
from megatron_dppo.rollout.sglang import SGLangEngine, weight_sync
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rollout.engine_contract import EngineUnderTest, assert_log_probs_match, make_prompts
from tests.rollout.sglang.conftest import server_config, tiny_weights

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(600)]

EP, DP_ATTENTION = ["--ep-size", "2"], ["--enable-dp-attention", "--dp-size", "2"]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(EP, id="EP2"),
        pytest.param(DP_ATTENTION, id="DP attention", marks=pytest.mark.nightly),
        pytest.param(
            [*DP_ATTENTION, "--enable-dp-lm-head"], id="DP attention and output layer", marks=pytest.mark.nightly
        ),
    ],
)
def test_new_weights_are_served_and_a_wrong_one_is_found(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_hf_model("qwen3_moe", tmp_path / "model", seed=0)
    config = server_config(tensor_model_parallel_size=2, extra_args=arguments, bucket_bytes=32768)
    engine = SGLangEngine(config, folder, vocab_size=250, dtype=torch.float32, log_folder=tmp_path)
    try:
        for version in (1, 2):
            hf_model, tensors = tiny_weights("qwen3_moe", seed=version)
            engine.update_weights(WholeWeights(tensors), version)
        samples = engine.generate(make_prompts(250, [5, 9, 4]), SamplingParams(max_new_tokens=6, samples_per_prompt=4))
        assert_log_probs_match(EngineUnderTest(engine, hf_model, lambda *_: None), samples, 1.0)

        intact = weight_sync.flatten

        def flip_one_bit(parts):
            flat, offset = intact(parts), 0
            for part in parts:
                if part.shape == tensors[EXPERT].shape and torch.equal(part, tensors[EXPERT]):
                    flat[offset] ^= 1
                offset += part.nbytes
            return flat

        monkeypatch.setattr(weight_sync, "flatten", flip_one_bit)
        with pytest.raises(WeightSyncError, match=r"model\.layers\.1\.mlp\.experts\.w13_weight differs"):
            engine.update_weights(WholeWeights(tensors), 3)
    finally:
        engine.close()
