"""HTTP to the servers: no request is lost to a connection that the server closed while it was idle."""

from __future__ import annotations

import socket
import threading

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
