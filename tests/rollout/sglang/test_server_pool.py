"""Which servers take part in an update: all of them at the start, those that answer later, and who is new among them.

The servers here only say which version they serve; test_failures.py does the same with real ones.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from megatron_dppo.errors import ConfigError, RolloutError, StoppedWaitingError
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.servers import pool as pool_module
from megatron_dppo.rollout.sglang.servers.pool import Fit, ServerPool
from megatron_dppo.rollout.sglang.servers.source import Found, NamedServers
from megatron_dppo.rollout.sglang.transport import Transport


class Server:
    """Answers ``/model_info``, at a port that stays its own while nobody answers there."""

    def __init__(self) -> None:
        self.version = "default"
        self.asked = 0
        self._serve(0)
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _serve(self, port: int) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                body = json.dumps({"weight_version": server.version}).encode()
                self.send_response(200 if server.version else 503)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def end(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def start_again(self) -> None:
        self.version = "default"
        self._serve(self.port)


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    found = [Server() for _ in range(3)]
    yield found
    for server in found:
        server.end()


@pytest.fixture
def transport() -> Iterator[Transport]:
    transport = Transport()
    yield transport
    transport.close()


def pool_of(servers: list[Server], transport: Transport, **options: object) -> ServerPool:
    urls = [server.url for server in servers]
    return ServerPool(SGLangConfig(urls=urls, control_timeout_s=10.0, **options), transport, NamedServers(urls))


def test_a_server_that_does_not_answer_is_left_out_until_it_is_found_again(servers, transport):
    pool = pool_of(servers, transport)
    pool.prepare()
    first, second, third = (server.url for server in servers)
    assert pool.fit(0) == Fit((first, second, third), frozenset({first, second, third}))
    for server in servers:
        server.version = "1"
    assert pool.fit(1) == Fit((first, second, third), frozenset())
    servers[1].end()
    assert pool.fit(1) == Fit((first, third), frozenset())
    for server in (servers[0], servers[2]):
        server.version = "2"
    servers[1].start_again()
    assert pool.fit(2) == Fit((first, second, third), frozenset({second}))


def test_a_server_that_was_started_again_between_two_updates_is_a_newcomer(servers, transport):
    for server in servers:
        server.version = "4"
    servers[2].end()
    servers[2].start_again()
    assert pool_of(servers, transport).fit(4).newcomers == {servers[2].url}


def test_found_servers_are_waited_for(servers, transport):
    servers[1].version = ""  # answers 503: it is loading
    pool = pool_of(servers, transport, startup_timeout_s=60.0)
    waiting = threading.Thread(target=pool.prepare)
    waiting.start()
    while servers[1].asked < 2:
        waiting.join(timeout=0.01)
        assert waiting.is_alive()
    servers[1].version = "default"
    waiting.join(timeout=30.0)
    assert not waiting.is_alive()


def test_servers_that_are_not_ready_in_time_are_named(servers, transport):
    servers[1].version = ""
    with pytest.raises(
        RolloutError, match=r"2 of 3 SGLang servers were ready after startup_timeout_s = 0.1 s"
    ) as raised:
        pool_of(servers, transport, startup_timeout_s=0.1).prepare()
    assert servers[1].url in str(raised.value)
    assert servers[0].url not in str(raised.value)


class Joining:
    """A source of servers of which more may come."""

    def __init__(self, servers: list[Server], awaited: tuple[str, ...] = (), failures: tuple[str, ...] = ()) -> None:
        self.servers, self.awaited, self.failures = servers, awaited, failures
        self.starts = 0

    expected = 2

    def start(self) -> None:
        self.starts += 1

    def find(self) -> Found:
        return Found(tuple(server.url for server in self.servers), self.awaited, self.failures)

    def close(self) -> None:
        pass


def test_a_server_that_joins_late_takes_part_from_the_next_update_on(servers, transport):
    source = Joining(servers[:2])
    pool = ServerPool(SGLangConfig(), transport, source)
    pool.prepare()
    for server in servers[:2]:
        server.version = "1"
    source.servers = servers
    assert pool.fit(1) == Fit(tuple(server.url for server in servers), frozenset({servers[2].url}))
    source.servers = servers[1:]
    assert pool.fit(1).urls == tuple(server.url for server in servers[1:])


def test_an_update_waits_for_a_server_that_is_on_its_way_only_if_it_is_needed(servers, transport):
    source = Joining(servers[:2], awaited=("one more",))
    assert len(ServerPool(SGLangConfig(min_servers=2), transport, source).fit(0).urls) == 2
    pool = ServerPool(SGLangConfig(num_servers=3, min_servers=3, startup_timeout_s=60.0), transport, source)
    threading.Timer(0.3, lambda: setattr(source, "servers", servers)).start()
    assert len(pool.fit(0).urls) == 3


def test_a_server_that_does_not_come_in_time_is_too_few(servers, transport):
    config = SGLangConfig(num_servers=3, min_servers=3, startup_timeout_s=0.1)
    with pytest.raises(
        RolloutError, match=r"2 of 2 SGLang servers answer, fewer than min_servers = 3; missing: one more"
    ):
        ServerPool(config, transport, Joining(servers[:2], awaited=("one more",))).fit(0)


def test_a_run_that_is_asked_to_stop_waits_no_longer(servers, transport):
    source = Joining(servers[:1], awaited=("one more",))
    config, reasons = SGLangConfig(num_servers=2, min_servers=2, startup_timeout_s=60.0), [None, "SIGTERM"]
    for wait in (ServerPool.prepare, lambda pool: pool.fit(0)):
        pool = ServerPool(config, transport, source, iter(reasons).__next__)
        with pytest.raises(StoppedWaitingError, match=r"\(SIGTERM\); missing: one more"):
            wait(pool)


def test_a_server_that_fails_to_start_ends_the_start_of_a_run_but_no_run(servers, transport):
    source = Joining(servers[:2], failures=("its log says why",))
    pool = ServerPool(SGLangConfig(), transport, source)
    with pytest.raises(RolloutError, match="its log says why"):
        pool.prepare()
    assert len(pool.fit(0).urls) == 2
    assert source.starts == 2, "it is started again"


def test_a_host_that_is_gone_is_waited_for_once(transport, monkeypatch):
    """It answers nothing, not even that nobody listens: later updates give it less time."""
    monkeypatch.setattr(pool_module, "_TO_ANSWER_AGAIN_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        pool = ServerPool(SGLangConfig(control_timeout_s=0.4), transport, NamedServers([url]))
        for limit in (0.4, 0.2, 0.2):
            with pytest.raises(RolloutError, match=rf"did not answer within {limit} s"):
                pool.fit(0)


def test_too_few_servers_are_an_error_that_names_those_that_do_not_answer(servers, transport):
    pool = pool_of(servers, transport, min_servers=3)
    pool.prepare()
    servers[0].end()
    with pytest.raises(RolloutError, match=r"2 of 3 SGLang servers answer, fewer than min_servers = 3") as raised:
        pool.fit(0)
    assert servers[0].url in str(raised.value)
    servers[0].start_again()
    assert len(pool.fit(0).urls) == 3


def test_more_servers_than_there_are_cannot_be_asked_for():
    with pytest.raises(ConfigError, match="min_servers = 3, but there are 2 servers"):
        SGLangConfig(urls=["http://a:1", "http://b:1"], min_servers=3).check()


class OwnServers(NamedServers):
    """Servers of this process. What is ended comes back by itself, healthy."""

    def __init__(self, servers: list[Server]) -> None:
        super().__init__([server.url for server in servers])
        self.servers = {server.url: server for server in servers}
        self.ended: list[str] = []

    def end(self, url: str) -> None:
        self.ended.append(url)
        self.servers[url].version = "default"


def test_an_own_server_that_hangs_from_one_update_to_another_is_ended_and_started_again(
    servers, transport, monkeypatch
):
    source = OwnServers(servers)
    config = SGLangConfig(num_servers=3, control_timeout_s=10.0, sync_timeout_s=100.0, hang_timeout_s=1000.0)
    pool = ServerPool(config, transport, source)
    pool.prepare()
    clock = time.monotonic()
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: clock, sleep=time.sleep))
    hung = servers[1]
    hung.version = ""
    for passed, ended in ((0.0, []), (900.0, []), (200.0, [hung.url])):
        clock += passed
        assert hung.url not in pool.fit(0).urls
        assert source.ended == ended
    assert hung.url in pool.fit(0).urls
    clock += 2000.0
    pool.fit(0)
    assert source.ended == [hung.url], "it answered since"


def test_a_server_that_ends_just_before_it_is_asked_is_started_again_if_it_is_needed(servers, transport, monkeypatch):
    """Its process was still there when those that had ended were started."""
    monkeypatch.setattr(pool_module, "_ASK_AGAIN_S", 0.01)
    source = Joining(servers[:1])
    pool = ServerPool(SGLangConfig(num_servers=2, min_servers=2), transport, source)

    def start() -> None:
        source.starts += 1
        if source.starts == 2:
            source.servers, source.awaited = servers[:2], ("the other",)

    source.start = start
    assert len(pool.fit(0).urls) == 2
    assert source.starts == 2
