"""Starting a server: its port is its own, one that was taken meanwhile is changed for another, on a CPU it keeps memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_dppo.errors import RolloutError
from megatron_dppo.rollout.sglang import SGLangConfig
from megatron_dppo.rollout.sglang.servers.nodes import Nodes
from megatron_dppo.rollout.sglang.servers.server import SGLangServer, free_port, server_environment
from megatron_dppo.rollout.sglang.transport import Transport
from tests.rollout.sglang.stand_in_server import stand_in_interpreter

NO_OTHERS = Nodes()


@pytest.fixture
def transport() -> Iterator[Transport]:
    transport = Transport()
    yield transport
    transport.close()


def _server(folder: Path, failures: int, nodes: Nodes = NO_OTHERS) -> SGLangServer:
    """What is started ends so often as a server does whose port is taken, and is healthy then."""
    interpreter = stand_in_interpreter(
        folder,
        f"echo start >> {folder}/starts\n"
        f"[ $(wc -l < {folder}/starts) -le {failures} ] && echo '[Errno 98] address already in use' && exit 1",
    )
    config = SGLangConfig(python=str(interpreter), startup_timeout_s=60.0)
    return SGLangServer(config, folder, "float32", folder, 0, nodes=nodes)


def test_ports_are_not_among_those_that_the_system_gives_away() -> None:
    first, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert all(1024 < free_port() < first for _ in range(20))


def test_a_server_whose_port_was_taken_starts_on_another(tmp_path: Path, transport: Transport) -> None:
    server = _server(tmp_path, failures=1)
    try:
        server.start()
        url = server.url
        server.wait_until_ready(transport)
        assert server.url != url
        assert server.is_running()
    finally:
        server.close()


def test_a_server_that_finds_no_port_is_given_up(tmp_path: Path, transport: Transport) -> None:
    server = _server(tmp_path, failures=9)
    server.start()
    with pytest.raises(RolloutError, match="address already in use"):
        server.wait_until_ready(transport)
    assert (tmp_path / "starts").read_text().count("start") == 3
    server.close()


def test_a_server_that_is_ready_has_set_aside_what_it_imported(tmp_path: Path, transport: Transport) -> None:
    """Otherwise a CPU server looks through all of it for garbage whenever its cache is flushed, in every weight update."""
    server = _server(tmp_path, failures=0)
    try:
        server.start()
        server.wait_until_ready(transport)
        assert "asked for /freeze_gc" in server.log_path.read_text()
    finally:
        server.close()


def test_a_node_that_is_not_the_first_of_its_server_is_ready_when_it_is_healthy(
    tmp_path: Path, transport: Transport
) -> None:
    """SGLang answers nothing but /health there."""
    server = _server(tmp_path, failures=0, nodes=Nodes(2, 1, "127.0.0.1:1"))
    try:
        server.start()
        server.wait_until_ready(transport)
        assert "/health" in server.log_path.read_text()
        assert "/freeze_gc" not in server.log_path.read_text()
    finally:
        server.close()


_TAKES_AND_GIVES_BACK = """
import ctypes, pathlib
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def resident_pages():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1])
before = resident_pages()
memory = library.malloc(64 * 2**20)
library.memset(memory, 1, 64 * 2**20)
library.free(memory)
print(resident_pages() - before)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's server keeps buckets in the GPU's memory")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other settings")
def test_memory_of_a_bucket_is_there_for_the_next_one() -> None:
    """As a share of 64 MiB that were taken, written to and given back: how much the process still has."""

    def kept(environment: dict[str, str]) -> float:
        command = [sys.executable, "-c", _TAKES_AND_GIVES_BACK]
        done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
        return int(done.stdout) * os.sysconf("SC_PAGE_SIZE") / (64 * 2**20)

    servers = server_environment(SGLangConfig())
    assert kept(servers) > 0.9
    assert kept({name: value for name, value in servers.items() if not name.startswith("MALLOC_")}) < 0.1
