"""Trainer and servers round their logits alike, or nothing is generated; without the rounding, they agree better."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megatron_dppo.errors import ConfigError, RolloutError
from megatron_dppo.rollout.sample import Sample, SamplingParams
from megatron_dppo.rollout.sglang import SGLangConfig, SGLangEngine
from megatron_dppo.rollout.sglang.server_settings import examine_settings
from megatron_dppo.rollout.sglang.servers.local import LocalServers
from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy, prepare_served_folder
from megatron_dppo.rollout.sglang.servers.server import SGLangServer
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.models.policy_runs import loaded_policy
from tests.models.tiny_policies import tiny_hf_model, write_tiny_hf_model
from tests.rank_pool import RankPools
from tests.rollout.engine_contract import make_prompts
from tests.rollout.sglang.conftest import RunningServer, server_config
from tests.rollout.sglang.stand_in_server import stand_in_interpreter

FLAG = "--enable-fp32-lm-head"
tool = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[3] / "tools" / "bench" / "mismatch.py")))


@pytest.mark.parametrize(
    ("trained_in", "served_in", "fp32_head", "flag"),
    [
        ("bfloat16", None, True, True),
        ("bfloat16", None, False, False),
        ("float32", "bfloat16", False, True),  # the trainer's logits are fp32 without a word
        ("float32", None, True, False),  # and so are those of a server in fp32
        ("bfloat16", "float32", True, False),
    ],
)
def test_servers_are_to_round_as_the_trainer_does(
    trained_in: str, served_in: str | None, fp32_head: bool, flag: bool
) -> None:
    policy = ServedPolicy.of_trainer(
        "model", trained_in, served_in=served_in, return_routed_experts=False, fp32_head=fp32_head
    )
    assert (policy.dtype, policy.fp32_head) == (served_in or trained_in, flag)


def test_a_trainer_that_rounds_has_no_use_for_servers_in_fp32() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sglang\.dtype=float32 .* set model\.fp32_head=true"):
        ServedPolicy.of_trainer("model", "bfloat16", served_in="float32", return_routed_experts=False, fp32_head=False)


@pytest.mark.parametrize("fp32_head", [False, True])
def test_a_server_that_is_started_gets_the_policys_head(tmp_path: Path, fp32_head: bool) -> None:
    policy = ServedPolicy(write_tiny_hf_model("qwen3_tied", tmp_path / "model"), "bfloat16", fp32_head=fp32_head)
    config, transport = SGLangConfig(python=str(stand_in_interpreter(tmp_path))), Transport()
    servers = LocalServers.of(policy, 1, config, transport, tmp_path / "logs")
    try:
        servers.start()
    finally:
        servers.close()
        transport.close()
    assert (FLAG in (tmp_path / "logs" / "sglang_server_0.log").read_text()) == fp32_head


@pytest.mark.sglang
@pytest.mark.slow
def test_a_server_says_that_it_rounds(servers: Callable[[str], RunningServer]) -> None:
    (url,) = servers("qwen3_tied").config.urls
    transport = Transport()
    info = transport.call(url, "/server_info", None, 60.0)
    transport.close()
    findings = examine_settings(info, ServedPolicy(Path(), "bfloat16", fp32_head=True))
    assert any("it rounds its logits" in finding.fault and finding.is_fatal for finding in findings)
    assert info["enable_fp32_lm_head"] is False  # said, and not only missing


@pytest.fixture
def bf16_servers(tmp_path: Path) -> Iterator[Callable[[bool, bool], SGLangEngine]]:
    """(whether the server's logits are fp32, whether the trainer's are) -> an engine of such a trainer on such a server."""
    folder = tmp_path / "model"
    model = tiny_hf_model("qwen3", seed=0, max_position_embeddings=384)
    tool.add_to_all_logits(model, 24.0)  # 16-bit logits lie on a grid of 0.125, next to which little else differs
    model.to(torch.bfloat16).save_pretrained(folder)
    served = prepare_served_folder(folder, tmp_path / "served")
    transport, engines = Transport(), []
    servers = {
        head: SGLangServer(server_config(), served, "bfloat16", tmp_path, int(head), fp32_head=head)
        for head in (False, True)
    }

    def attach(server_head: bool, trainer_head: bool) -> SGLangEngine:
        engines.append(
            SGLangEngine(
                server_config(urls=[servers[server_head].url]),
                folder,
                vocab_size=250,
                dtype=torch.bfloat16,
                log_folder=tmp_path,
                fp32_head=trainer_head,
            )
        )
        return engines[-1]

    try:
        for server in servers.values():
            server.start()
        for server in servers.values():
            server.wait_until_ready(transport)
        yield attach
    finally:
        for engine in engines:
            engine.close()
        for server in servers.values():
            server.close()
        transport.close()


def _mean_abs_log_ratios(folder: str, samples: list[Sample]) -> dict[str, float]:
    """By the trainer's head."""
    log_ratios, _ = tool.measure(loaded_policy(folder, {}, torch.bfloat16), samples, False)
    return {head: tool.mismatch(values).mean_abs_log_ratio for head, values in log_ratios.items()}


@pytest.mark.sglang
@pytest.mark.nightly  # two servers of its own; on every push test_preflight.py has the findings, the test above their source
@pytest.mark.timeout(900)
def test_mismatch_falls_with_fp32_logits_on_both_sides_and_one_side_alone_is_refused(
    bf16_servers: Callable[[bool, bool], SGLangEngine], ranks: RankPools, tmp_path: Path
) -> None:
    tensors = WholeWeights(load_file(tmp_path / "model" / "model.safetensors"))
    for server_head, message in ((False, "it rounds its logits to 16 bits"), (True, "it leaves its logits in fp32")):
        with pytest.raises(RolloutError, match=message):
            bf16_servers(server_head, not server_head).update_weights(tensors, 1)
    measured = {}
    for head in (False, True):
        engine = bf16_servers(head, head)
        engine.update_weights(tensors, 1)
        params = SamplingParams(max_new_tokens=32, samples_per_prompt=4, seed=5)
        samples = engine.generate(make_prompts(250, [5, 9, 20, 33]), params)
        (measured["fp32" if head else "bf16"],) = ranks(1).run(_mean_abs_log_ratios, str(tmp_path / "model"), samples)
    assert measured["fp32"]["fp32"] < 0.5 * measured["bf16"]["bf16"], measured
    assert measured["fp32"]["fp32"] < 0.5 * measured["fp32"]["bf16"], measured
