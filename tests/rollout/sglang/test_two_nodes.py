"""A server that is larger than a host: two processes that share one, as two hosts do, with all that a server is for."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo.errors import ConfigError
from megatron_dppo.rollout.sample import SamplingParams
from megatron_dppo.rollout.sglang import SGLangEngine
from megatron_dppo.rollout.sglang.servers.local import LocalServers
from megatron_dppo.rollout.sglang.servers.nodes import Nodes
from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy
from megatron_dppo.rollout.sglang.servers.server import first_gpu, free_port
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rollout.engine_contract import EngineUnderTest, assert_log_probs_match, make_prompts
from tests.rollout.sglang.conftest import server_config, tiny_weights
from tests.waiting import wait_until


@pytest.mark.sglang
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_server_on_two_nodes_is_updated_and_generates(tmp_path) -> None:
    model = write_tiny_hf_model("qwen3_tied", tmp_path / "model", seed=0)
    config, transport = server_config(tensor_model_parallel_size=2), Transport()
    head, policy = f"127.0.0.1:{free_port()}", ServedPolicy(model, "float32")
    hosts = [
        LocalServers.of(policy, 1, config, transport, tmp_path / f"node-{rank}", Nodes(2, rank, head))
        for rank in range(2)
    ]
    try:
        for host in hosts:
            host.start()
        wait_until(lambda: hosts[0].find().urls != (), within_s=300, what="node 0 generates")
        assert [host.find().failures for host in hosts] == [(), ()]
        attached = server_config(urls=list(hosts[0].find().urls))
        engine = SGLangEngine(attached, model, vocab_size=250, dtype=torch.float32, log_folder=tmp_path)
        for seed in (3, 4):
            hf_model, tensors = tiny_weights("qwen3_tied", seed)
            engine.update_weights(WholeWeights(tensors), version=seed)
            samples = engine.generate(make_prompts(250, [5, 9]), SamplingParams(max_new_tokens=6, samples_per_prompt=2))
            assert_log_probs_match(EngineUnderTest(engine, hf_model, lambda *_: None), samples, 1.0)
        engine.close()
    finally:
        for host in hosts:
            host.close()
        transport.close()


def test_each_host_gives_its_share_of_gpus() -> None:
    config = server_config(tensor_model_parallel_size=16, base_gpu_id=0)
    assert first_gpu(config, 0, gpu_count=8, hosts=2) == 0
    with pytest.raises(ConfigError, match="needs GPUs 0 to 15"):
        first_gpu(config, 0, gpu_count=8)


@pytest.mark.parametrize(
    ("nodes", "named"),
    [
        (Nodes(2, 2, "a:1"), "--node-rank 2 of --nnodes 2"),
        (Nodes(2, 0, None), "--head"),
        (Nodes(1, 0, "a:1"), "--head"),
        (Nodes(3, 0, "a:1"), "no multiple of --nnodes 3"),
    ],
)
def test_hosts_that_cannot_share_a_server_are_refused(nodes: Nodes, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        nodes.check(4)
