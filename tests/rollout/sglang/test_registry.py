"""Servers register in a folder, or stand in a text file; whoever reads either finds all that are there, and nothing else."""

from __future__ import annotations

import json
import os
import sys

import pytest

from megatron_dppo.errors import RolloutError
from megatron_dppo.rollout.sglang.servers.registry import RegisteredServers, Registration, Registry, read_registry
from megatron_dppo.rollout.sglang.servers.software import Software, software_here, software_of


def of(url: str) -> Registration:
    return Registration(url, "node-1", 17)


def test_servers_are_found_from_their_registration_until_they_leave(tmp_path):
    registry = Registry(tmp_path / "servers")
    registry.enter("node-2-0", of("http://10.0.0.2:1"))
    registry.enter("node-1-0", of("http://10.0.0.1:1"))
    assert read_registry(tmp_path / "servers") == ["http://10.0.0.1:1", "http://10.0.0.2:1"]
    registry.enter("node-2-0", of("http://10.0.0.2:9"))  # started again, on another port
    registry.leave("node-1-0")
    registry.leave("node-1-0")
    assert read_registry(tmp_path / "servers") == ["http://10.0.0.2:9"]


def test_what_else_is_in_the_folder_is_no_server(tmp_path):
    Registry(tmp_path).enter("node-1-0", of("http://10.0.0.1:1"))
    (tmp_path / "logs").mkdir()
    (tmp_path / ".node-2-0.77").write_text('{"url": "http://10.0.')  # being written
    assert read_registry(tmp_path) == ["http://10.0.0.1:1"]


def test_a_text_file_has_an_address_a_line(tmp_path):
    (tmp_path / "servers.txt").write_text(
        "# rack 4\nhttp://10.0.0.2:30000/\n\nhttp://10.0.0.1:30000  # new\nhttp://10.0.0.2:30000\n"
    )
    assert read_registry(tmp_path / "servers.txt") == ["http://10.0.0.2:30000", "http://10.0.0.1:30000"]


def test_nobody_is_registered_where_nothing_is_yet(tmp_path):
    found = RegisteredServers(tmp_path / "servers", expected=2).find()
    assert found.urls == ()
    assert found.awaited == (f"2 more to register in {tmp_path / 'servers'}",)


def test_more_servers_than_expected_are_welcome(tmp_path):
    for index in range(3):
        Registry(tmp_path).enter(f"node-{index}", of(f"http://10.0.0.{index}:1"))
    found = RegisteredServers(tmp_path, expected=2).find()
    assert (len(found.urls), found.awaited) == (3, ())


def test_what_servers_run_on_is_told_by_those_who_know(tmp_path):
    said = Software("2.14.1", "2.30.7")
    Registry(tmp_path).enter("node-1", Registration("http://10.0.0.1:1", "node-1", 17, said))
    Registry(tmp_path).enter("node-2", of("http://10.0.0.2:1"))
    registered = RegisteredServers(tmp_path, expected=2)
    assert registered.software_of("http://10.0.0.1:1") == said
    assert registered.software_of("http://10.0.0.2:1") is None
    assert registered.software_of("http://10.0.0.3:1") is None


@pytest.mark.slow
def test_an_interpreter_is_asked_what_it_brings(tmp_path):
    assert software_of(sys.executable, os.environ) == software_here()
    assert software_of(str(tmp_path / "no_python"), os.environ) is None
    assert software_of("true", os.environ) is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"url": "10.0.0.1:1"}), json.dumps({"url": None})])
def test_a_registration_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "node-1-0.server.json").write_text(content)
    with pytest.raises(RolloutError, match=r"node-1-0\.server\.json"):
        read_registry(tmp_path)


def test_an_address_that_is_none_is_named(tmp_path):
    (tmp_path / "servers.txt").write_text("10.0.0.1:30000\n")
    with pytest.raises(RolloutError, match=r"servers\.txt: '10\.0\.0\.1:30000' does not start with http"):
        read_registry(tmp_path / "servers.txt")
