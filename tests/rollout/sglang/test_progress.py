"""Requests fail by their server's lack of progress, not by their total time; and what is seen of its load meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_dppo.errors import RefusedRequestError, StoppedWaitingError, TransientServerError
from megatron_dppo.rollout.engine import ServerLoad
from megatron_dppo.rollout.sample import FailedSample, Prompt, Sample, SamplingParams
from megatron_dppo.rollout.sglang.client import RolloutClient
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.progress import ProgressWatch
from megatron_dppo.rollout.sglang.router import Router
from megatron_dppo.rollout.sglang.transport import Transport
from tests.rollout.sglang.virtual_time import FakeRouter, FakeServer, VirtualTimeTransport, idle, response_of, steady

A, B, ROUTER = "http://a:1", "http://b:1", "http://router:1"
SAMPLING = SamplingParams(max_new_tokens=3)
REQUEST = {"sampling_params": {"max_new_tokens": 3}}


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{index}", (5, 6)) for index in range(count)]


@contextlib.contextmanager
def _client(
    servers: Mapping[str, FakeServer], stop: Callable[[float], str | None] = lambda now: None, **options: Any
) -> Iterator[RolloutClient]:
    """``stop``: why to give up, by the time of the loop."""
    config = SGLangConfig(**{"request_timeout_s": 300.0, "generate_timeout_s": 7200.0, **options})
    config.check()
    transport = VirtualTimeTransport(servers)
    client = RolloutClient(transport, config, stop=lambda: stop(transport.loop.time()))
    client.set_servers(list(servers))
    yield client
    transport.close()


def _generate(servers: Mapping[str, FakeServer], count: int, **options: Any) -> list[Sample | FailedSample]:
    with _client(servers, **options) as client:
        return client.generate(_prompts(count), SAMPLING, weight_version=1)


def _no_such_endpoint(now: float) -> Any:
    raise RefusedRequestError("/v1/loads refused the request (404): Not Found")


def _overloaded(now: float) -> Any:
    raise TransientServerError("/v1/loads failed (503)")


def test_a_response_may_take_many_times_the_timeout_while_its_server_makes_progress():
    server = FakeServer(response_s=(3000.0,))
    (sample,) = _generate({A: server}, 1)
    assert isinstance(sample, Sample)
    assert len(server.asked) == 1


def test_the_whole_call_stays_bounded():
    (sample,) = _generate({A: FakeServer(response_s=(9000.0,))}, 1)
    assert "not complete after generate_timeout_s = 7200 s" in sample.reason


def test_responses_are_given_up_within_seconds_when_the_run_is_to_stop():
    server, asked = FakeServer(response_s=(1.0, 3000.0)), []

    def stop(now: float) -> str | None:
        asked.append(now)
        return "SIGUSR1" if now >= 100.0 else None

    with (
        _client({A: server}, stop) as client,
        pytest.raises(StoppedWaitingError, match="SIGUSR1 amid rollouts, which were given up"),
    ):
        client.generate(_prompts(2), SAMPLING, weight_version=1)
    assert 100.0 <= asked[-1] < 103.0


@pytest.mark.parametrize("silent", [False, True])
def test_requests_of_a_server_that_hangs_go_to_another_when_the_timeout_has_passed(silent):
    """``silent``: also its load cannot be asked for. Otherwise it is reported, the same again and again."""
    hung, well = FakeServer(hangs_from=0.5, silent=silent), FakeServer()
    with _client({A: hung, B: well}, control_timeout_s=60.0) as client:
        samples = client.generate(_prompts(4), SAMPLING, weight_version=1)
        assert [type(sample) for sample in samples] == [Sample] * 4
        assert hung.asked == [0.0, 0.0]
        assert well.asked[:2] == [0.0, 0.0]
        # 300 s without progress, found out at most one poll later; 60 s for the health check; a second until the next try.
        assert [360 <= time < 365 for time in well.asked[2:]] == [True, True]
        client.generate(_prompts(4), SAMPLING, weight_version=1)
        assert list(client.last_loads) == [B]


def test_the_failure_names_server_and_seconds():
    (sample,) = _generate({A: FakeServer(hangs_from=0.5)}, 1, max_attempts=1)
    assert f"{A} made no progress for request_timeout_s = 300 s" in sample.reason


def test_a_server_that_lost_a_request_but_is_well_is_given_the_whole_timeout_again():
    server = FakeServer(response_s=(math.inf, 250.0), loads=lambda now: steady(0.0))
    (sample,) = _generate({A: server}, 1)
    assert isinstance(sample, Sample)
    assert len(server.asked) == 2


def test_time_without_a_request_is_not_held_against_a_server():
    transport = VirtualTimeTransport({A: FakeServer(response_s=(250.0,), loads=lambda now: steady(0.0))})

    async def ask_twice() -> list[Any]:
        async with ProgressWatch(transport, [A], timeout_s=300.0, control_timeout_s=60.0) as watch:
            answers = []
            for _ in range(2):
                answers.append(await watch.answer(A, transport.request(A, "/generate", REQUEST, 1000.0)))
                await asyncio.sleep(1000.0)
            return answers

    assert transport.submit(ask_twice()).result() == [response_of(3)] * 2
    transport.close()


def test_complete_responses_are_progress_where_the_load_is_not_reported():
    """The second response takes 500 s, and comes 250 s after the first."""
    server = FakeServer(response_s=(250.0, 500.0), loads=_no_such_endpoint)
    samples = _generate({A: server}, 2)
    assert [type(sample) for sample in samples] == [Sample] * 2
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("loads", "why"),
    [
        (_no_such_endpoint, "404"),
        (lambda now: [], "reports no scheduler"),
        (lambda now: None, "the server's answer is not of the form"),
        (lambda now: [{"num_used_tokens": now}], "the server's answer has no 'num_waiting_reqs'"),
    ],
    ids=["no endpoint", "no scheduler", "no list", "no queue"],
)
def test_where_the_load_cannot_be_had_the_failure_says_so(loads, why):
    (sample,) = _generate({A: FakeServer(response_s=(400.0,), loads=loads)}, 1, max_attempts=1)
    assert f"{A} made no progress for request_timeout_s = 300 s" in sample.reason
    assert "only complete responses were counted" in sample.reason
    assert why in sample.reason


def test_a_load_that_cannot_be_had_now_is_asked_for_again():
    server = FakeServer(response_s=(500.0,), loads=lambda now: _overloaded(now) if now < 200 else steady(now))
    (sample,) = _generate({A: server}, 1)
    assert isinstance(sample, Sample)
    assert len(server.asked) == 1


def test_a_watcher_that_fails_is_not_silent():
    def broken(now: float) -> Any:
        raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError, match="a defect"):
        _generate({A: FakeServer(response_s=(10.0,), loads=broken)}, 1)


def test_the_deepest_queue_and_the_tokens_per_second_of_every_server_are_kept():
    def two_schedulers(now: float) -> list[dict[str, Any]]:
        return [{"num_waiting_reqs": 7 if 3 < now < 7 else 1}, {"num_waiting_reqs": 4}]

    servers = {A: FakeServer((10.0,), loads=two_schedulers), B: FakeServer((5.0,), loads=_no_such_endpoint)}
    servers["http://c:1"] = FakeServer()
    with _client(servers) as client:
        assert client.last_loads == {}
        client.generate(_prompts(2), SAMPLING, weight_version=1)
        assert client.last_loads == {
            A: ServerLoad(queue_depth_max=11, tokens_per_s=0.3),
            B: ServerLoad(queue_depth_max=None, tokens_per_s=0.3),
            "http://c:1": ServerLoad(queue_depth_max=None, tokens_per_s=0.0),
        }
        client.generate([], SAMPLING, weight_version=1)
        assert client.last_loads == {}


class _Answers(BaseHTTPRequestHandler):
    """A server without /v1/loads that answers /generate at once."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps(response_of(request["sampling_params"]["max_new_tokens"])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


def test_over_http_a_server_that_accepts_and_never_answers_loses_its_requests():
    config = SGLangConfig(request_timeout_s=1.0, control_timeout_s=0.5, max_attempts=20)
    transport = Transport()
    answering = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=answering.serve_forever, daemon=True).start()
    try:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            client = RolloutClient(transport, config)
            urls = [f"http://127.0.0.1:{port}" for port in (silent.getsockname()[1], answering.server_port)]
            client.set_servers(urls)
            samples = client.generate(_prompts(4), SAMPLING, weight_version=1)
            assert [type(sample) for sample in samples] == [Sample] * 4
            assert client.last_loads[urls[0]] == ServerLoad(None, 0.0)
            client.generate(_prompts(1), SAMPLING, weight_version=1)
            assert list(client.last_loads) == urls[1:]
    finally:
        answering.shutdown()
        answering.server_close()
        transport.close()


def _routed(servers: Mapping[str, FakeServer], count: int, **options: Any) -> tuple[list[Any], FakeRouter, ServerLoad]:
    """(samples, the router afterwards, the load behind it)."""
    router = FakeRouter(servers)
    config = SGLangConfig(router=ROUTER, request_timeout_s=300.0, generate_timeout_s=7200.0, **options)
    transport = VirtualTimeTransport({**servers, ROUTER: router})
    client = RolloutClient(transport, config, router=Router(ROUTER, transport, config))
    client.set_servers(list(servers))
    samples = client.generate(_prompts(count), SAMPLING, weight_version=1)
    (load,) = client.last_loads.values()
    transport.close()
    return samples, router, load


def test_behind_a_router_a_server_without_requests_is_no_failure():
    busy, spared = FakeServer(response_s=(3000.0,)), FakeServer(response_s=(1.0,), loads=idle)
    samples, router, load = _routed({A: busy, B: spared}, 2)
    assert [type(sample) for sample in samples] == [Sample] * 2
    assert (len(busy.asked), len(spared.asked)) == (1, 1)
    assert sorted(router.workers) == [A, B]
    assert load == ServerLoad(0, 6 / 3000)


@pytest.mark.parametrize("silent", [False, True])
def test_a_server_that_hangs_behind_a_router_is_taken_out_and_all_requests_are_asked_for_again(silent):
    """Nobody knows which requests it has. ``silent``: also its load cannot be asked for."""
    hung, well = FakeServer(hangs_from=0.5, silent=silent), FakeServer(response_s=(3000.0, 3000.0, 1000.0))
    samples, router, _ = _routed({A: hung, B: well}, 4, control_timeout_s=60.0)
    assert [type(sample) for sample in samples] == [Sample] * 4
    assert router.workers == [B]
    assert len(hung.asked) == 2
    # 300 s without progress, 60 s for the health check, a second until the next try: the two that it had, and the two that
    # it might have had. After that nobody waits for it any more, however long the others take.
    assert well.asked[:2] == [0.0, 0.0]
    assert [360 <= time < 365 for time in well.asked[2:]] == [True] * 4


def test_a_router_that_is_gone_fails_samples_and_drops_no_server():
    servers = {A: FakeServer(), B: FakeServer()}

    class Gone(FakeRouter):
        async def answer(self, path: str, body: dict[str, Any] | None) -> Any:
            raise TransientServerError("cannot be reached")

    transport = VirtualTimeTransport({**servers, ROUTER: Gone(servers)})
    config = SGLangConfig(router=ROUTER, max_attempts=2)
    client = RolloutClient(transport, config, router=Router(ROUTER, transport, config))
    client.set_servers([A, B])
    (sample,) = client.generate(_prompts(1), SAMPLING, weight_version=1)
    transport.close()
    assert "failed 2 times; last: cannot be reached" in sample.reason
    assert client._dispatch.urls == [A, B]
