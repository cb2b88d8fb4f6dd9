"""Servers that do not start, die, or lose their trainer: a clear error in bounded time, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from megatron_dppo.errors import RefusedRequestError, RolloutError
from megatron_dppo.rollout.sample import FailedSample, SamplingParams
from megatron_dppo.rollout.sglang import SGLangEngine
from megatron_dppo.rollout.sglang.keys import ServerKeys
from megatron_dppo.rollout.sglang.servers import server as server_module
from megatron_dppo.rollout.sglang.servers.served_policy import prepare_served_folder
from megatron_dppo.rollout.sglang.servers.server import SGLangServer
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rollout.engine_contract import EngineUnderTest, assert_log_probs_match, make_prompts
from tests.rollout.sglang.conftest import SERVER_PYTHON, server_config, tiny_weights
from tests.rollout.sglang.server_faults import signal_when_they_work

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


def _engine(folder: Path, **options: object) -> SGLangEngine:
    model_folder = write_tiny_hf_model("llama", folder / "model", seed=0)
    return SGLangEngine(server_config(**options), model_folder, vocab_size=250, dtype=torch.float32, log_folder=folder)


def _servers_of(engine: SGLangEngine) -> list[SGLangServer]:
    return engine._pool._source.servers


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Every process that belongs to a server of a model in ``folder``, worker processes included."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        if str(folder) in " ".join(process.info["cmdline"] or []):
            found += [process, *process.children(recursive=True)]
    return found


def _assert_all_end(processes: list[psutil.Process], timeout_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path):
    broken = tmp_path / "python"  # an interpreter without SGLang, whatever is installed beside this test
    broken.write_text(f"#!/bin/sh\nexec {sys.executable} -m no_such_module\n")
    broken.chmod(0o755)
    with pytest.raises(RolloutError, match="No module named no_such_module") as raised:
        _engine(tmp_path, python=str(broken))
    assert str(tmp_path / "sglang_server_0.log") in str(raised.value)


def test_a_server_that_is_too_slow_to_start_is_given_up(tmp_path):
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\necho still loading\nsleep 1000\n")
    sleeper.chmod(0o755)
    with pytest.raises(RolloutError, match=r"not ready after startup_timeout_s = 3 s(.|\n)*still loading"):
        _engine(tmp_path, python=str(sleeper), startup_timeout_s=3.0)
    _assert_all_end(_processes_of(tmp_path), timeout_s=5)


def test_a_model_folder_without_a_config_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json in"):
        SGLangEngine(server_config(), tmp_path, vocab_size=250, dtype=torch.float32, log_folder=tmp_path)


def _assert_only_who_has_the_keys_is_let_in(url: str, folder: Path) -> None:
    for keys in (ServerKeys(), ServerKeys(api="of those who generate")):
        stranger = Transport(keys)
        with pytest.raises(RefusedRequestError, match="401"):
            stranger.call(url, "/pause_generation", {}, timeout_s=10)
        if keys.api is None:
            with pytest.raises(RefusedRequestError, match="401"):
                stranger.call(url, "/generate", {"input_ids": [1]}, timeout_s=10)
        stranger.close()
    shown = [(folder / "sglang_server_0.log").read_text(), *(" ".join(p.cmdline()) for p in _processes_of(folder))]
    assert not any("of those who change weights" in text.partition("server_args=")[0] for text in shown)


@pytest.mark.timeout(600)
def test_requests_of_a_dead_server_go_to_the_others_and_it_comes_back(tmp_path, monkeypatch):
    """Two servers that ask for keys; one dies mid-generation and is started again; then both die."""
    monkeypatch.setenv("API_KEY", "of those who generate")
    monkeypatch.setenv("ADMIN_KEY", "of those who change weights")
    keys = {"api_key_variable": "API_KEY", "admin_api_key_variable": "ADMIN_KEY"}
    engine = _engine(tmp_path, num_servers=2, generate_timeout_s=100.0, **keys)  # also to find out that none is left
    try:
        hf_model, tensors = tiny_weights("llama", seed=1)
        subject = EngineUnderTest(engine, hf_model, lambda *_: None)
        # Some 4,000 tokens: seconds of work for two servers, so that they die in the midst of it.
        prompts, long = make_prompts(250, [4] * 12), SamplingParams(max_new_tokens=60, samples_per_prompt=6)
        engine.update_weights(WholeWeights(tensors), version=1)
        _assert_only_who_has_the_keys_is_let_in(_servers_of(engine)[0].url, tmp_path)

        killer = signal_when_they_work(_servers_of(engine)[:1])
        samples = engine.generate(prompts, long)
        killer.join()
        assert [len(sample.response_ids) for sample in samples] == [60] * 72
        assert_log_probs_match(subject, samples[::29], 1.0)
        with pytest.raises(RolloutError, match="cannot be reached"):
            engine.health()

        engine.update_weights(WholeWeights(tensors), version=2)  # nobody waits for the server that loads
        assert engine._sync.urls == [_servers_of(engine)[1].url]
        engine._config.min_servers = 2
        engine.update_weights(WholeWeights(tensors), version=3)  # but if it is needed
        engine.health()
        samples = engine.generate(prompts, SamplingParams(max_new_tokens=4))
        assert {sample.weight_versions[0] for sample in samples} == {(3, 4)}
        assert_log_probs_match(subject, samples, 1.0)

        killer = signal_when_they_work(_servers_of(engine))
        samples = engine.generate(prompts, long)
        killer.join()
        assert len(samples) == 72
        lost = [sample for sample in samples if isinstance(sample, FailedSample)]
        assert lost  # what was complete before is kept
        assert any("no SGLang server is left" in sample.reason for sample in lost)
    finally:
        engine.close()
    _assert_all_end(_processes_of(tmp_path), timeout_s=5)


_TRAINER = """
import signal, sys, torch
from megatron_dppo.rollout.sglang import SGLangEngine
from tests.rollout.sglang.conftest import server_config
folder, python = sys.argv[1:]
engine = SGLangEngine(server_config(python=python), folder + "/model", vocab_size=250, dtype=torch.float32, log_folder=folder)
print("ready", flush=True)
signal.pause()
"""
# It is well, has a process of its own, and does not end when asked to.
_STUBBORN_SERVER = """
import signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Well(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"weight_version": "default"}')
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "1000"])
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Well).serve_forever()
"""


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["stubborn", "real"])
def test_a_server_ends_with_a_trainer_that_is_killed(tmp_path, real):
    write_tiny_hf_model("llama", tmp_path / "model", seed=0)
    python = tmp_path / "python"
    (tmp_path / "server.py").write_text(_STUBBORN_SERVER)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/server.py "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, "-c", _TRAINER, str(tmp_path), SERVER_PYTHON if real else str(python)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    try:
        assert trainer.stdout.readline() == b"ready\n"
        processes = [process for process in _processes_of(tmp_path) if process.pid != trainer.pid]
        assert len(processes) >= 3, "the server and its workers were expected"
    finally:
        trainer.kill()
        trainer.wait()
    _assert_all_end(processes, timeout_s=20)


# Nightly from here on. On every push test_progress.py has a server that hangs, and test_server_pool.py one that was lost.
@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Two servers that somebody else starts, and the folder of everything; they may not be ready yet."""
    folder = tmp_path_factory.mktemp("found")
    served = prepare_served_folder(write_tiny_hf_model("llama", folder / "model", seed=0), folder / "served")
    servers = [SGLangServer(server_config(), served, "float32", folder, index) for index in range(2)]
    for server in servers:
        server.start()
    yield servers, folder
    for server in servers:
        server.close()
    _assert_all_end(_processes_of(folder), timeout_s=5)


def _attach(servers: list[SGLangServer], folder: Path, **options: object) -> SGLangEngine:
    config = server_config(urls=[server.url for server in servers], **options)
    return SGLangEngine(config, folder / "model", vocab_size=250, dtype=torch.float32, log_folder=folder)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_requests_of_a_server_that_hangs_go_to_the_others(found):
    """One of two servers is stopped mid-generation: its connections stay open, and it answers nothing any more."""
    servers, folder = found
    engine = _attach(servers, folder, control_timeout_s=20.0)  # waits until they are ready
    try:
        _, tensors = tiny_weights("llama", seed=1)
        engine.update_weights(WholeWeights(tensors), version=1)
        prompts = make_prompts(250, [4] * 8)
        engine.generate(prompts, SamplingParams(max_new_tokens=4))  # a server's first batch takes seconds

        engine._config.request_timeout_s = 15.0
        stopper = signal_when_they_work(servers[:1], signal.SIGSTOP)
        samples = engine.generate(prompts, SamplingParams(max_new_tokens=100, samples_per_prompt=16))
        stopper.join()
        assert [len(sample.response_ids) for sample in samples] == [100] * 128
        first, second = (server.url for server in servers)
        assert engine.server_loads()[second].tokens_per_s > engine.server_loads()[first].tokens_per_s
        assert f"{first} made no progress for request_timeout_s = 15 s" in engine._client._last_failure
    finally:
        os.killpg(servers[0]._process.pid, signal.SIGCONT)
        engine.close()


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_found_server_that_was_lost_is_taken_back_by_the_next_update(found, monkeypatch):
    """One of two servers ends, is missing in an update, and is there again in the next."""
    servers, folder = found
    first, lost = (server.url for server in servers)
    engine, transport = _attach(servers, folder), Transport()
    try:
        hf_model, tensors = tiny_weights("llama", seed=1)
        subject, prompts = EngineUnderTest(engine, hf_model, lambda *_: None), make_prompts(250, [4] * 8)
        for version, urls in ((1, {first, lost}), (2, {first}), (3, {first, lost})):
            if version == 2:
                servers[1].close()
            if version == 3:
                monkeypatch.setattr(server_module, "free_port", lambda: int(lost.rpartition(":")[2]))
                servers[1].start()
                servers[1].wait_until_ready(transport)
            engine.update_weights(WholeWeights(tensors), version=version)
            samples = engine.generate(prompts, SamplingParams(max_new_tokens=4, samples_per_prompt=2))
            assert {sample.weight_versions[0] for sample in samples} == {(version, 4)}
            assert_log_probs_match(subject, samples, 1.0)
            assert {url for url, load in engine.server_loads().items() if load.tokens_per_s > 0} == urls
    finally:
        engine.close()
        transport.close()


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_two_thousand_requests_at_once_are_all_answered_in_bounded_memory(found):
    servers, folder = found
    engine = _attach(servers, folder, max_concurrent_requests=2000, request_timeout_s=120.0, generate_timeout_s=500.0)
    try:
        _, tensors = tiny_weights("llama", seed=1)
        engine.update_weights(WholeWeights(tensors), version=1)
        prompts = make_prompts(250, [4, 9, 2, 7] * 50)
        engine.generate(prompts, SamplingParams(max_new_tokens=8, samples_per_prompt=2))
        before = psutil.Process().memory_info().rss
        samples = engine.generate(prompts, SamplingParams(max_new_tokens=8, samples_per_prompt=10))
        growth = psutil.Process().memory_info().rss - before
        assert [sample.group_id for sample in samples] == [prompt for prompt in range(200) for _ in range(10)]
        assert all(len(sample.response_ids) == 8 for sample in samples)
        loads = engine.server_loads()
        assert min(load.tokens_per_s for load in loads.values()) > 0.3 * max(
            load.tokens_per_s for load in loads.values()
        )
        print(f"2000 requests: {growth / 2**20:.1f} MiB")
        # A task, a connection with its buffers and a request of 200 bytes each: some 40 KiB.
        assert growth < 2000 * 64 * 1024
    finally:
        engine.close()
