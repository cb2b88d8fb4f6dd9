"""HTTP to the servers: no request is lost to a connection that the server closed while it was idle; each has its key."""

from __future__ import annotations

import http.server
import socket
import threading

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.rollout.sglang import SGLangConfig
from megatron_dppo.rollout.sglang.keys import ServerKeys
from megatron_dppo.rollout.sglang.transport import Transport


def answer_one_request_per_connection(listener: socket.socket) -> None:
    """Offer to keep the connection, then close it when it is used again: a keep-alive timeout at its worst."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\n{}")
            connection.recv(65536)


def test_an_idle_connection_that_the_server_closes_costs_no_request():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer_one_request_per_connection, args=(listener,), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        transport = Transport()
        try:
            assert [transport.call(url, "/update", {"step": step}, timeout_s=10) for step in range(3)] == [{}, {}, {}]
        finally:
            transport.close()


def _heard(keys: ServerKeys, paths: list[str]) -> list[str | None]:
    """The Authorization header of a request to each path."""
    headers: list[str | None] = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            headers.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        transport = Transport(keys)
        try:
            for path in paths:
                transport.call(f"http://127.0.0.1:{server.server_port}", path, {}, timeout_s=10)
        finally:
            transport.close()
            server.shutdown()
    return headers


PATHS = ["/generate", "/pause_generation", "/update_weights_from_distributed"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (ServerKeys(), [None, None, None]),
        (ServerKeys(api="a"), ["Bearer a"] * 3),
        (ServerKeys(admin="b"), [None, "Bearer b", "Bearer b"]),
        (ServerKeys(api="a", admin="b"), ["Bearer a", "Bearer b", "Bearer b"]),
    ],
)
def test_each_request_carries_the_key_that_a_server_asks_for(keys, expected):
    assert _heard(keys, PATHS) == expected


def test_keys_are_read_from_the_environment_and_never_shown(monkeypatch):
    config = SGLangConfig(api_key_variable="THE_KEY")
    with pytest.raises(ConfigError, match="api_key_variable names the environment variable THE_KEY, which is not set"):
        config.check()
    monkeypatch.setenv("THE_KEY", "secret")
    config.check()
    assert config.keys.headers("/generate") == {"Authorization": "Bearer secret"}
    assert "secret" not in f"{config} {config.keys}"
