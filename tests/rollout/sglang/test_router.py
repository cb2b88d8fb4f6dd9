"""A real sglang-router: it passes requests on to the servers that it is told, and to no others, and ends with the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_dppo.errors import ConfigError, RefusedRequestError, RolloutError
from megatron_dppo.rollout.sample import Sample, SamplingParams
from megatron_dppo.rollout.sglang import SGLangConfig, SGLangEngine
from megatron_dppo.rollout.sglang.preflight import Preflight
from megatron_dppo.rollout.sglang.router import Router
from megatron_dppo.rollout.sglang.servers.router_process import RouterProcess
from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rollout.engine_contract import EngineUnderTest, assert_log_probs_match, make_prompts
from tests.rollout.sglang.conftest import SERVER_PYTHON, server_config, tiny_weights
from tests.rollout.sglang.server_faults import signal_when_they_work

KEY = "of those who generate"


@pytest.fixture(scope="module")
def router_python() -> str:
    assert SERVER_PYTHON is not None
    if subprocess.run([SERVER_PYTHON, "-c", "import sglang_router.router"], capture_output=True).returncode:
        pytest.skip("the interpreter of MEGATRON_DPPO_SGLANG_PYTHON has no sglang-router (pip install sglang-router)")
    return SERVER_PYTHON


class StandIn:
    """What the router takes for a server: each of another model, and none without a key. It answers with its own address."""

    def __init__(self) -> None:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer({"model_path": stand_in.url, "tp_size": 1})

            def do_POST(self) -> None:
                stand_in.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self._answer({"by": stand_in.url})

            def _answer(self, content: dict[str, Any]) -> None:
                is_open = self.path.startswith("/health") or self.headers["Authorization"] == f"Bearer {KEY}"
                body = json.dumps(content).encode()
                self.send_response(200 if is_open else 401)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.asked: list[dict[str, Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def stand_ins() -> Iterator[list[StandIn]]:
    made = [StandIn() for _ in range(3)]
    yield made
    for stand_in in made:
        stand_in.close()


@pytest.fixture
def config(router_python: str, monkeypatch: pytest.MonkeyPatch) -> SGLangConfig:
    monkeypatch.setenv("API_KEY", KEY)
    return SGLangConfig(python=router_python, router="start", api_key_variable="API_KEY", control_timeout_s=20.0)


@pytest.fixture
def transport(config: SGLangConfig) -> Iterator[Transport]:
    made = Transport(config.keys)
    yield made
    made.close()


@pytest.fixture
def process(config: SGLangConfig, transport: Transport, tmp_path: Path) -> Iterator[RouterProcess]:
    made = RouterProcess(config, transport, tmp_path)
    yield made
    made.close()


@pytest.fixture
def serve_by(process: RouterProcess, config: SGLangConfig, transport: Transport) -> Callable[[list[str]], None]:
    router = Router(process.url, transport, config)
    return lambda urls: transport.submit(router.serve_by(urls)).result()


def answered_by(process: RouterProcess, transport: Transport, prompts: list[list[int]]) -> list[str]:
    """Who answered each, all asked for at the same time."""

    def ask(prompt: list[int]) -> str:
        body = {"input_ids": prompt, "sampling_params": {"sampling_seed": 7}}
        return str(transport.call(process.url, "/generate", body, 20.0)["by"])

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


def different_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 250, (count, 60), generator=generator).tolist()


@pytest.mark.slow
@pytest.mark.sglang
def test_it_passes_on_to_the_servers_that_it_is_told_and_samples_of_a_prompt_to_one(
    serve_by, process, stand_ins, transport
):
    a, b, c = (stand_in.url for stand_in in stand_ins)
    serve_by([a, b])
    prompts = different_prompts(8)
    answers = answered_by(process, transport, prompts)
    assert set(answers) == {a, b}
    for prompt in prompts:
        assert len(set(answered_by(process, transport, [prompt] * 6))) == 1
    serve_by([c, b])
    assert set(answered_by(process, transport, prompts)) == {b, c}


@pytest.mark.slow
@pytest.mark.sglang
def test_a_server_that_is_taken_out_gets_nothing_any_more(serve_by, config, process, stand_ins, transport):
    a, b = (stand_in.url for stand_in in stand_ins[:2])
    serve_by([a, b])
    router = Router(process.url, transport, config)
    for _ in range(2):  # every replica that has seen it fail says so
        transport.submit(router.take_out(a)).result()
    assert transport.submit(router.workers()).result() == [b]
    assert set(answered_by(process, transport, different_prompts(8))) == {b}


@pytest.mark.slow
@pytest.mark.sglang
def test_expert_choices_cannot_be_had_through_it(serve_by, process, stand_ins, transport):
    """Why routing replay refuses it. If this fails, a newer one passes them on."""
    serve_by([stand_ins[0].url])
    body = {"input_ids": [1], "sampling_params": {}, "return_logprob": True, "return_routed_experts": True}
    transport.call(process.url, "/generate", body, 20.0)
    (passed_on,) = stand_ins[0].asked
    assert passed_on["return_logprob"] is True
    assert "return_routed_experts" not in passed_on


@pytest.mark.slow
@pytest.mark.sglang
def test_only_who_has_the_key_is_let_in_and_nobody_sees_it(process):
    stranger = Transport()
    try:
        for path, body in (("/workers", None), ("/generate", {"input_ids": [1]})):
            with pytest.raises(RefusedRequestError, match="401"):
                stranger.call(process.url, path, body, 20.0)
    finally:
        stranger.close()
    group = psutil.Process(process._process.pid)
    assert not any(KEY in " ".join(each.cmdline()) for each in [group, *group.children(recursive=True)])


@pytest.mark.slow
@pytest.mark.sglang
def test_one_that_ended_is_started_again_at_its_address_and_none_is_left(serve_by, process, stand_ins):
    os.killpg(process._process.pid, signal.SIGKILL)
    process._process._process.wait(timeout=20)
    process.start_again()
    serve_by([stand_ins[0].url])
    everyone = [psutil.Process(process._process.pid), *psutil.Process(process._process.pid).children(recursive=True)]
    process.close()
    assert psutil.wait_procs(everyone, timeout=5)[1] == []


def test_what_is_missing_to_start_one_is_said(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"No module named 'sglang_router'\"; exit 1\n")
    python.chmod(0o755)
    transport = Transport()
    try:
        with pytest.raises(RolloutError, match=r"pip install sglang-router(.|\n)*No module named 'sglang_router'"):
            RouterProcess(SGLangConfig(python=str(python), router="start"), transport, tmp_path)
    finally:
        transport.close()


@pytest.mark.parametrize("router", ["", "started", "10.0.0.5:3000"])
def test_what_is_no_router_is_refused(router: str) -> None:
    with pytest.raises(ConfigError, match=r"SGLangConfig\.router must be the address of a router"):
        SGLangConfig(router=router).check()


def test_routing_replay_through_a_router_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = write_tiny_hf_model("qwen3_moe", tmp_path / "model", seed=0)
    with pytest.raises(ConfigError, match="expert choices"):
        SGLangEngine(
            SGLangConfig(router="start"),
            folder,
            vocab_size=250,
            dtype=torch.float32,
            log_folder=tmp_path,
            return_routed_experts=True,
        )


@pytest.mark.nightly  # on every push: the real router, before servers that are made up
@pytest.mark.slow
@pytest.mark.sglang
@pytest.mark.timeout(900)
def test_real_servers_behind_it_die_come_back_and_generate_with_the_newest_weights_alone(
    router_python, tmp_path, monkeypatch
):
    monkeypatch.setenv("API_KEY", KEY)
    folder = write_tiny_hf_model("llama", tmp_path / "model", seed=0)
    config = server_config(num_servers=2, router="start", api_key_variable="API_KEY", control_timeout_s=20.0)
    engine = SGLangEngine(config, folder, vocab_size=250, dtype=torch.float32, log_folder=tmp_path)
    started = psutil.Process().children(recursive=True)
    try:
        hf_model, tensors = tiny_weights("llama", seed=1)
        subject = EngineUnderTest(engine, hf_model, lambda *_: None)
        prompts, sampling = make_prompts(250, [20] * 12), SamplingParams(max_new_tokens=60, samples_per_prompt=6)

        def generate(version: int) -> None:
            samples = engine.generate(prompts, sampling)
            assert Counter(map(type, samples)) == {Sample: 72}, [s for s in samples if not isinstance(s, Sample)][:1]
            assert {sample.weight_versions[0] for sample in samples} == {(version, 60)}
            assert_log_probs_match(subject, samples[::13], 1.0)

        engine.update_weights(WholeWeights(tensors), 1)
        assert sorted(engine._transport.submit(engine._router.workers()).result()) == sorted(engine._sync.urls)
        generate(1)
        (load,) = engine.server_loads().values()
        assert load.tokens_per_s > 0

        servers = engine._pool._source.servers
        killer = signal_when_they_work(servers[:1])
        generate(1)
        killer.join()
        os.killpg(engine._router_process._process.pid, signal.SIGKILL)
        config.min_servers = 2
        engine.update_weights(WholeWeights(tensors), 2)
        assert engine._transport.submit(engine._router.workers()).result() == sorted(s.url for s in servers)
        generate(2)

        preflight = Preflight(config, ServedPolicy(Path(), "float32"), engine._transport, longest=100)
        report = preflight.examine_router(engine._router, engine._sync.urls)
        assert report.findings == [], str(report)
        assert "a token came through it" in str(report)
    finally:
        engine.close()
    assert psutil.wait_procs(started, timeout=5)[1] == []
