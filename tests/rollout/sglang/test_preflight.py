"""Before a run: what would go wrong later is found, named with its remedy, and the servers are left as they were."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.preflight import Preflight
from megatron_dppo.rollout.sglang.server_settings import TESTED_VERSION, examine_settings, examine_software
from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy
from megatron_dppo.rollout.sglang.servers.software import Software
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.server_check import check_servers

POLICY = ServedPolicy(Path("model"), "bfloat16")
WELL = {"version": TESTED_VERSION, "dtype": "bfloat16", "quantization": None, "kv_cache_dtype": "auto"}


@pytest.mark.parametrize(
    ("setting", "remedy", "is_fatal"),
    [
        ({"dtype": "float32"}, "--dtype bfloat16", True),
        ({"quantization": "fp8"}, "--quantization", True),
        ({"ep_num_redundant_experts": 2}, "--ep-num-redundant-experts", True),
        ({"kv_cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype auto", False),
        ({"enable_fp32_lm_head": True}, "model.fp32_head=true, or start it without --enable-fp32-lm-head", True),
        ({"version": "0.5.10"}, f"sglang=={TESTED_VERSION}", False),
    ],
)
def test_a_setting_that_changes_numbers_is_found(setting, remedy, is_fatal):
    assert examine_settings(WELL, POLICY) == []
    (finding,) = examine_settings({**WELL, **setting}, POLICY)
    assert remedy in finding.remedy
    assert finding.is_fatal == is_fatal


def test_a_server_without_expert_choices_cannot_serve_routing_replay():
    replayed = dataclasses.replace(POLICY, return_routed_experts=True)
    (finding,) = examine_settings(WELL, replayed)
    assert finding.is_fatal
    assert examine_settings({**WELL, "enable_return_routed_experts": True}, replayed) == []


def test_a_server_that_rounds_its_logits_cannot_serve_a_trainer_that_does_not():
    not_rounded = dataclasses.replace(POLICY, fp32_head=True)
    (finding,) = examine_settings(WELL, not_rounded)
    assert finding.is_fatal
    assert str(finding) == (
        "it rounds its logits to 16 bits, and the trainer does not (model.fp32_head=true, or model.dtype=fp32): start it"
        " with --enable-fp32-lm-head, or set model.fp32_head=false in bf16"
    )
    assert examine_settings({**WELL, "enable_fp32_lm_head": True}, not_rounded) == []
    in_fp32 = dataclasses.replace(POLICY, dtype="float32")
    assert all(
        examine_settings({**WELL, "dtype": "float32", "enable_fp32_lm_head": flag}, in_fp32) == [] for flag in (0, 1)
    )


class Answers:
    """In place of a transport: the log-probs of the three likeliest tokens, by a rule of the test's."""

    def __init__(self, log_prob):
        self.log_prob = log_prob

    def call(self, url, path, body, timeout_s):
        assert path == "/generate"
        temperature = body["sampling_params"]["temperature"]
        tops = [[self.log_prob(token, temperature), token, None] for token in range(3)]
        return {"meta_info": {"output_top_logprobs": [tops]}}


@pytest.mark.parametrize(
    ("log_prob", "found"),
    [
        (lambda token, temperature: -1.0 - token / temperature, None),
        (lambda token, temperature: -1.5, None),  # all alike
        (lambda token, temperature: -1.0 - token, "at the temperature"),
        (lambda token, temperature: 0.0 - token / temperature, "more than 1"),
    ],
    ids=["right", "flat", "not scaled", "no probabilities"],
)
def test_log_probs_of_another_distribution_are_found(log_prob, found):
    preflight = Preflight(SGLangConfig(), POLICY, Answers(log_prob), longest=10)
    findings = [finding.fault for finding in preflight._meaning_of_log_probs("http://a:1")]
    assert bool(findings) == (found is not None)
    assert found is None or found in findings[0]


@pytest.mark.sglang
@pytest.mark.slow
def test_real_servers_pass_and_keep_their_weights(servers):
    """Of both sizes at once: the byte reaches three ranks of two servers."""
    running = [servers("qwen3_moe"), servers("qwen3_tied")]
    urls = [server.config.urls[0] for server in running]
    transport = Transport()

    def checksums() -> list[object]:
        return [transport.call(url, "/weights_checker", {"action": "checksum"}, 60) for url in urls]

    try:
        before = checksums()
        preflight = Preflight(running[0].config, ServedPolicy(Path(), "float32"), transport, longest=300)
        reports = preflight.examine(urls)
        assert [report.subject for report in reports] == [*urls, "this host to 2 servers"]
        assert [report.findings for report in reports] == [[], [], []], "\n".join(map(str, reports))
        assert "a byte arrived" in str(reports[-1])
        assert checksums() == before
        for wrong, longest, fault in ((POLICY, 300, "bfloat16"), (ServedPolicy(Path(), "float32"), 10**6, "1000000")):
            (report,) = Preflight(running[0].config, wrong, transport, longest).examine(urls[:1])
            assert report.is_fatal
            assert fault in str(report)
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("nccl_there", "by_nccl", "is_fatal"),
    [("2.30.7", True, False), ("2.27.3", True, True), (None, True, True), ("2.27.3", False, False)],
)
def test_another_nccl_is_found_where_bytes_travel_by_it(nccl_there, by_nccl, is_fatal):
    here, there = Software("2.14.1", "2.30.7"), Software("2.13.0", nccl_there)
    assert [finding.is_fatal for finding in examine_software(there, here, by_nccl=by_nccl)] == [True] * is_fatal
    assert examine_software(None, here, by_nccl=by_nccl) == []  # who has not said is asked by the byte


@pytest.mark.sglang
@pytest.mark.slow
def test_the_servers_of_a_run_are_checked_as_it_is_configured(servers, tmp_path):
    server, config = servers("qwen3_moe"), Config()
    config.model.path, config.model.dtype = str(server.model_folder), "fp32"
    config.run.root, config.rollout.engine, config.rollout.sglang = str(tmp_path / "runs"), "sglang", server.config
    config.rollout.max_response_tokens = config.rollout.max_prompt_tokens = 100
    reports = check_servers(config)
    assert len(reports) == 2
    assert not any(report.is_fatal for report in reports), "\n".join(map(str, reports))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_without_servers_has_none_to_check():
    with pytest.raises(ConfigError, match=r"rollout\.engine=embedded"):
        check_servers(Config())
