"""A command for every host: it runs with the run, is started again, ends with it, and says why if it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.servers import guarded_process
from megatron_dppo.rollout.sglang.servers.launched import LaunchedServers
from megatron_dppo.rollout.sglang.servers.registry import RegisteredServers
from tests.waiting import wait_until


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., LaunchedServers]]:
    made = []

    def make(template: str, hosts: list[str], serve: list[str]) -> LaunchedServers:
        registered = RegisteredServers(tmp_path / "registry", expected=len(hosts))
        made.append(LaunchedServers(template, hosts, serve, registered, tmp_path))
        return made[-1]

    yield make
    for servers in made:
        servers.close()


def lines(path: Path) -> list[str]:
    return sorted(path.read_text().splitlines()) if path.exists() else []


def test_every_host_is_given_the_command_with_its_words_intact(launch, tmp_path):
    serve = ["printf", "%s\n", "a b", "$HOME", "it's"]
    servers = launch(f"for i in 1; do {{serve}} {{host}} >> {tmp_path}/said; done; cat", ["node-1", "node-2"], serve)
    servers.start()
    wait_until(lambda: len(lines(tmp_path / "said")) == 8, within_s=10, what="both commands speak")
    assert lines(tmp_path / "said") == sorted(["a b", "$HOME", "it's", "node-1", "a b", "$HOME", "it's", "node-2"])


def test_without_hosts_the_command_runs_once(launch, tmp_path):
    servers = launch(f"{{serve}} >> {tmp_path}/said; cat", [], ["echo", "one"])
    servers.start()
    wait_until(lambda: lines(tmp_path / "said") != [], within_s=10, what="the command speaks")
    running = servers._processes["servers"].pid
    servers.start()
    assert servers._processes["servers"].pid == running, "it is not started again while it runs"
    servers.close()
    assert lines(tmp_path / "said") == ["one"]


def test_a_command_that_ends_says_why_and_is_started_again(launch, tmp_path):
    servers = launch(f"echo node {{host}} is down; {{serve}} >> {tmp_path}/said; exit 1", ["n1"], ["echo", "up"])
    servers.start()
    wait_until(lambda: servers.find().failures != (), within_s=10, what="the command ends")
    (failure,) = servers.find().failures
    assert "the servers of n1" in failure
    assert "node n1 is down" in failure
    servers.start()
    wait_until(lambda: lines(tmp_path / "said") == ["up", "up"], within_s=10, what="it runs again")


def test_what_runs_on_the_host_is_told_the_end_by_its_standard_input(launch, tmp_path):
    """It may be out of reach of signals: ssh leaves behind what it has started."""
    apart = f"setsid --wait sh -c 'touch {tmp_path}/began; cat; touch {tmp_path}/ended' # {{serve}}"
    servers = launch(apart, [], ["true"])
    servers.start()
    wait_until((tmp_path / "began").exists, within_s=10, what="it begins")
    assert not (tmp_path / "ended").exists()
    servers.close()
    wait_until((tmp_path / "ended").exists, within_s=10, what="it ends")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"launch": "ssh {host}", "launch_hosts": ["a"]}, r"no \{serve\}"),
        ({"launch": "{serve}", "launch_hosts": ["a"]}, r"no \{host\}"),
        ({"launch": "ssh {host} {serve}"}, "launch_hosts"),
        ({"launch_hosts": ["a"]}, "launch has no command"),
        ({"launch": "ssh {host} {serve}", "launch_hosts": ["a", "a"]}, "'a' is listed twice"),
        ({"launch": "{serve}", "urls": ["http://a:1"]}, "urls and launch"),
        ({"registry": "servers", "urls": ["http://a:1"]}, "urls and registry"),
    ],
)
def test_a_launch_that_cannot_work_is_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        SGLangConfig(**options).check()


def test_hosts_are_given_the_time_to_end_their_servers_all_at_once(launch, tmp_path):
    slow_to_end = f"trap 'sleep 1; echo {{host}} >> {tmp_path}/ended; exit' TERM; echo {{host}} >> {tmp_path}/up"
    hosts = [f"node-{number}" for number in range(4)]
    servers = launch(f"{slow_to_end}; while :; do sleep 0.05; done", hosts, ["true"])
    servers.start()
    wait_until(lambda: lines(tmp_path / "up") == hosts, within_s=10, what="all commands run")
    patience_of_one = guarded_process._TERMINATE_GRACE_S  # 0.2 s here: see conftest.py
    assert patience_of_one < 1
    servers.close()
    assert lines(tmp_path / "ended") == hosts
