"""However a run or a server ends, it leaves nothing: no process, no shared memory, no socket or temporary file.

Nor a connection or a group on a server that goes on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_dppo.errors import RefusedRequestError
from megatron_dppo.rollout.sglang.servers.served_policy import prepare_served_folder
from megatron_dppo.rollout.sglang.servers.server import SGLangServer
from megatron_dppo.rollout.sglang.transport import Transport
from tests.forked_ranks import StartedScript, free_port, rank_environment, start_ranks, start_script
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


class Host:
    """What is left on this host: in shared memory, and where those that were started here have temporary files."""

    def __init__(self) -> None:
        self._before = set(os.listdir("/dev/shm"))
        # Not in pytest's folder: a socket's path has 107 characters.
        self.temporary = Path(tempfile.mkdtemp(prefix="left-", dir="/tmp"))

    def shared_memory(self) -> set[str]:
        """Of servers: other processes of this host, as those of tests beside these, make and leave what is theirs."""
        return {name for name in os.listdir("/dev/shm") if name.startswith(("sgl_shm_", "sglang_"))} - self._before

    def files(self) -> list[Path]:
        """Compiled kernels are there to stay."""
        return [path for path in self.temporary.rglob("*") if not path.is_relative_to(self._kernels)]

    def holds_a_server(self) -> bool:
        """Otherwise the tests here would see nothing that could be left."""
        return any(name.startswith("sglang_loads") for name in self.shared_memory()) and any(
            path.is_socket() for path in self.files()
        )

    def is_clean(self) -> bool:
        return not self.shared_memory() and not self.files()

    @property
    def _kernels(self) -> Path:
        return next(self.temporary.glob("torchinductor_*"), self.temporary / "none")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host()
    monkeypatch.setenv("TMPDIR", str(made.temporary))
    yield made
    shutil.rmtree(made.temporary, ignore_errors=True)


_OWNER = """
import sys, time
from pathlib import Path
from megatron_dppo.rollout.sglang.servers.server import SGLangServer
from megatron_dppo.rollout.sglang.transport import Transport
from tests.rollout.sglang.conftest import server_config
folder = Path(sys.argv[1])
server = SGLangServer(server_config(tensor_model_parallel_size=2), folder, "float32", folder.parent, 0)
server.start()
server.wait_until_ready(Transport())
print(server.pid, flush=True)
time.sleep(1000) if sys.argv[2] == "stays" else server.close()
"""


@pytest.mark.parametrize("killed", ["nobody", "its first process", "all of it", "its owner", "all of it and its owner"])
def test_a_server_leaves_nothing_on_its_host(host: Host, tmp_path: Path, killed: str) -> None:
    """Of two ranks, which talk by a queue in shared memory that the first of them unlinks if it can."""
    policy = prepare_served_folder(write_tiny_policy(tmp_path / "policy"), tmp_path / "served")
    server, transport = (
        SGLangServer(server_config(tensor_model_parallel_size=2), policy, "float32", tmp_path, 0),
        Transport(),
    )
    if "owner" in killed:
        command = [sys.executable, "-c", _OWNER, str(policy), "stays"]
        owner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        group = int(owner.stdout.readline())
    else:
        server.start()
        server.wait_until_ready(transport)
        assert server.pid is not None
        group = server.pid
    assert host.holds_a_server()
    assert any(name.startswith("sgl_shm_mq") for name in host.shared_memory())
    everyone = [psutil.Process(group), *psutil.Process(group).children(recursive=True)]
    if killed == "its first process":
        (first,) = psutil.Process(group).children()
        first.kill()
        wait_until(lambda: not server.is_running(), within_s=20, what="the guard notices")
    elif killed == "all of it":
        os.killpg(group, signal.SIGKILL)
    elif killed == "all of it and its owner":
        owner.send_signal(signal.SIGSTOP)  # it must not see its server end
        os.killpg(group, signal.SIGKILL)
    if "owner" in killed:
        owner.kill()
        owner.wait()
    server.close()
    transport.close()
    if killed == "all of it and its owner":
        # Some of them take a second to end, and what is theirs is not touched before.
        assert psutil.wait_procs(everyone, timeout=20)[1] == []
        server.start()  # the next server on this host
        server.close()
    wait_until(host.is_clean, within_s=20, what=f"{host.shared_memory()}, {host.files()} go")


@pytest.mark.parametrize(
    ("script", "steps", "stop", "codes"),
    [
        (QUICK_SCRIPT, 1, None, {0}),
        (NAN_SCRIPT, 5, None, {3}),
        (QUICK_SCRIPT, 1000, signal.SIGINT, {75}),
        (QUICK_SCRIPT, 1000, signal.SIGKILL, {-signal.SIGKILL}),
    ],
    ids=["success", "error", "ctrl-c", "killed"],
)
def test_a_run_with_a_server_of_its_own_leaves_nothing_on_its_host(
    host: Host, tmp_path: Path, script: Path, steps: int, stop: signal.Signals | None, codes: set[int]
) -> None:
    policy = write_tiny_policy(tmp_path / "policy")
    arguments = training_arguments(policy, tmp_path, "run", *OPTIONS, f"train.steps={steps}")
    port, log = free_port(), tmp_path / "log"
    environments = [{**rank_environment(rank, 2, port), "TMPDIR": str(host.temporary)} for rank in range(2)]
    processes = start_ranks(script, arguments, environments, folder=tmp_path, log=log)
    run = StartedScript(processes, log, time.monotonic() + 600)
    if stop is not None:
        wait_for_step(tmp_path / "run", 1)
        assert host.holds_a_server()
        for process in run.processes if stop == signal.SIGKILL else run.processes[:1]:
            os.kill(process.pid, stop)
    ended, output = run.ends()
    assert set(ended) == codes, output[-4000:]
    wait_until(lambda: processes_in(tmp_path) == [], within_s=20, what="all processes of the run end")
    wait_until(host.is_clean, within_s=20, what=f"{host.shared_memory()}, {host.files()} go")
