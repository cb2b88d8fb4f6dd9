"""However a run ends, it leaves nothing: no process, no shared memory, no connection or group on a server that goes on."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_dppo.errors import RefusedRequestError
from megatron_dppo.rollout.sglang.servers.served_policy import prepare_served_folder
from megatron_dppo.rollout.sglang.servers.server import SGLangServer
from megatron_dppo.rollout.sglang.transport import Transport
from tests.forked_ranks import start_script
from tests.rollout.sglang.conftest import server_config
from tests.training.tiny_runs import (
    QUICK_SCRIPT,
    ROOT,
    kill,
    train,
    training_arguments,
    wait_for_step,
    write_tiny_policy,
)
from tests.waiting import wait_until

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]

NAN_SCRIPT = ROOT / "tests" / "training" / "nan_gradients_script.py"
OPTIONS = (
    "rollout.engine=sglang",
    "warm_start.steps=2",
    "rollout.prompts_per_step=4",
    "eval.prompts=4",
    "checkpoint.every=0",
    "train.max_skipped_steps=0",
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SGLangServer, Path]]:
    folder = tmp_path_factory.mktemp("served")
    policy = write_tiny_policy(folder / "policy")
    server = SGLangServer(server_config(), prepare_served_folder(policy, folder / "served"), "float32", folder, 0)
    transport = Transport()
    server.start()
    try:
        server.wait_until_ready(transport)
        yield server, policy
    finally:
        server.close()
        transport.close()


def connections(server: SGLangServer) -> int:
    """That are open between the server's processes and anybody."""
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    open_ones = [
        c for process in processes for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED
    ]
    return len(open_ones)


def groups(server: SGLangServer) -> list[str]:
    """Update groups that the server is in. It leaves them over it."""
    transport, found = Transport(), []
    for name in (f"megatron_dppo_0_{index}" for index in range(4)):
        with contextlib.suppress(RefusedRequestError):  # there is none of this name
            transport.call(server.url, "/destroy_weights_update_group", {"group_name": name}, 30)
            found.append(name)
    transport.close()
    return found


def processes_in(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.parametrize(
    ("script", "steps", "stop", "codes"),
    [(QUICK_SCRIPT, 2, None, {0}), (NAN_SCRIPT, 5, None, {3}), (QUICK_SCRIPT, 1000, signal.SIGINT, {75})],
    ids=["success", "error", "ctrl-c"],
)
def test_a_run_leaves_nothing_behind(served, tmp_path, script, steps, stop, codes) -> None:
    server, policy = served
    before, shared_memory = connections(server), set(os.listdir("/dev/shm"))
    attached = f"rollout.sglang.urls=[{server.url}]"
    arguments = training_arguments(policy, tmp_path, "run", *OPTIONS, attached, f"train.steps={steps}")
    run = start_script(script, arguments, ranks=2, folder=tmp_path, timeout=600)
    if stop is not None:
        wait_for_step(tmp_path / "run", 1)
        assert connections(server) > before, "it is in a group with the trainer"
        os.kill(run.processes[1].pid, stop)
    ended, output = run.ends()
    assert set(ended) == codes, output[-4000:]
    wait_until(lambda: processes_in(tmp_path) == [], within_s=10, what="all processes of the run end")
    wait_until(lambda: connections(server) <= before, within_s=10, what="the server's connections are closed")
    assert set(os.listdir("/dev/shm")) <= shared_memory
    assert groups(server) == []


def test_what_a_run_that_was_killed_left_on_a_server_goes_with_the_next_run(served, tmp_path) -> None:
    server, policy = served
    before = connections(server)
    attached = (*OPTIONS, f"rollout.sglang.urls=[{server.url}]")
    endless = training_arguments(policy, tmp_path, "run", *attached, "train.steps=1000")
    killed = start_script(QUICK_SCRIPT, endless, ranks=2, folder=tmp_path, timeout=600)
    wait_for_step(tmp_path / "run", 1)
    kill(killed)
    train(policy, tmp_path, "another", *attached, "train.steps=1", timeout=600)
    wait_until(lambda: connections(server) <= before, within_s=10, what="the server's connections are closed")
    assert groups(server) == []
