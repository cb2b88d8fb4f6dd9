"""One of two real servers answers "success" to a bucket and drops a tensor of it: nothing is generated from such weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dppo.errors import RolloutError, WeightSyncError
from megatron_dppo.rollout.sample import Sample, SamplingParams
from megatron_dppo.rollout.sglang import SGLangEngine
from megatron_dppo.rollout.sglang.servers.local import LocalServers
from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rollout.engine_contract import EngineUnderTest, assert_log_probs_match, make_prompts
from tests.rollout.sglang.conftest import server_config, tiny_weights
from tests.waiting import wait_until

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(600)]

# SGLang's llama passes over what it does not know, with a warning in its log.
TENSORS = [
    f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lying")
    write_tiny_hf_model("llama", made / "model", seed=0)
    return made


@pytest.fixture(scope="module")
def urls(folder: Path) -> Iterator[list[str]]:
    """Two servers. No engine owns them, as one whose update has failed is of no use any more."""
    transport = Transport()
    servers = LocalServers.of(ServedPolicy(folder / "model", "float32"), 2, server_config(), transport, folder)
    servers.start()
    try:
        wait_until(lambda: len(servers.find().urls) == 2, within_s=300, what="both generate")
        yield list(servers.find().urls)
    finally:
        servers.close()
        transport.close()


@pytest.mark.parametrize("seed", range(3))
def test_server_and_tensor_are_named_and_the_next_engine_mends_it(folder: Path, urls: list[str], seed: int) -> None:
    chance = random.Random(seed)
    liar, dropped = chance.choice(urls), chance.choice(TENSORS)
    hf_model, tensors = tiny_weights("llama", seed + 1)
    prompts, sampling = make_prompts(250, [4, 9] * 4), SamplingParams(max_new_tokens=8, samples_per_prompt=2)

    def attach() -> SGLangEngine:
        config = server_config(urls=urls)
        return SGLangEngine(config, folder / "model", vocab_size=250, dtype=torch.float32, log_folder=folder)

    engine = attach()
    intact, answers = engine._transport.request, []

    async def request(url: str, path: str, body: Any, timeout_s: float) -> Any:
        if (url, path) != (liar, "/update_weights_from_distributed"):
            return await intact(url, path, body, timeout_s)
        names = [f"dropped.{name}" if name == dropped else name for name in body["names"]]
        answers.append(await intact(url, path, {**body, "names": names}, timeout_s))
        return answers[-1]

    engine._transport.request = request
    with pytest.raises(WeightSyncError) as raised:
        engine.update_weights(WholeWeights(tensors), version=1)
    assert answers != []
    assert all(answer["success"] for answer in answers)
    assert dropped in str(raised.value)
    assert liar in str(raised.value)
    with pytest.raises(RolloutError, match="weight update to version 1 failed"):
        engine.generate(prompts, sampling)
    engine.close()

    engine = attach()
    engine.update_weights(WholeWeights(tensors), version=2)
    samples = engine.generate(prompts, sampling)
    assert [type(sample) for sample in samples] == [Sample] * 16
    assert {sample.weight_versions[0] for sample in samples} == {(2, 8)}
    assert_log_probs_match(EngineUnderTest(engine, hf_model, lambda *_: None), samples, 1.0)
    engine.close()
