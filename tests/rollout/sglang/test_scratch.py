"""What processes leave on a host is removed however they ended, and nothing that is anybody else's.

The processes here make what a server makes, by the same names; test_nothing_left.py has real servers.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_dppo.rollout.sglang.servers import scratch as scratch_module
from megatron_dppo.rollout.sglang.servers.guarded_process import GuardedProcess
from megatron_dppo.rollout.sglang.servers.scratch import Scratch
from tests.rollout.sglang.leaving_server import LeavingServer
from tests.waiting import wait_until

ROOT = Path(__file__).parents[3]
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def token() -> Iterator[str]:
    made = secrets.token_hex(4)
    yield made
    for path in SHARED_MEMORY.glob(f"*{made}*"):
        path.unlink()


def left(token: str) -> list[str]:
    return sorted(path.name for path in SHARED_MEMORY.glob(f"*{token}*"))


def _end(server: LeavingServer) -> None:
    server.process.end()


def _kill_all(server: LeavingServer) -> None:
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.end()


def _wait_for_its_end(server: LeavingServer) -> None:
    wait_until(lambda: not server.process.is_running(), within_s=20, what="it ends")
    server.process.end()


@pytest.mark.parametrize(
    ("words", "ending"),
    [((), _end), ((), _kill_all), (("ends",), _wait_for_its_end)],
    ids=["asked to", "killed with its guard", "by itself, a worker stays"],
)
def test_a_server_that_has_ended_leaves_nothing(
    tmp_path: Path, token: str, words: tuple[str, ...], ending: Callable[[LeavingServer], None]
) -> None:
    server = LeavingServer(tmp_path, token, *words)
    assert len(left(token)) == 2
    ending(server)
    assert left(token) == []
    assert not server.scratch.folder.exists()


OWNER = """
import sys, time
from pathlib import Path
from tests.rollout.sglang.leaving_server import LeavingServer
server = LeavingServer(Path(sys.argv[1]), sys.argv[2])
print(server.scratch.folder, server.process.pid, flush=True)
time.sleep(1000)
"""


def _owner(folder: Path, token: str) -> tuple[subprocess.Popen[str], Path, int]:
    """A process that has started a server, the server's folder, its group."""
    command = [sys.executable, "-c", OWNER, str(folder), token]
    owner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    scratch, group = owner.stdout.readline().split()
    return owner, Path(scratch), int(group)


@pytest.mark.slow
def test_nothing_is_left_of_a_server_whose_owner_was_killed(tmp_path: Path, token: str) -> None:
    owner, scratch, _ = _owner(tmp_path, token)
    owner.kill()
    owner.wait()
    wait_until(lambda: not scratch.exists(), within_s=20, what="the folder goes")
    assert left(token) == []


@pytest.mark.slow
def test_what_is_left_of_a_server_that_was_killed_with_its_owner_goes_with_the_next(tmp_path: Path, token: str) -> None:
    owner, scratch, group = _owner(tmp_path, token)
    owner.send_signal(signal.SIGSTOP)  # it must not see its server end
    os.killpg(group, signal.SIGKILL)
    owner.kill()
    owner.wait()
    wait_until(lambda: scratch_module._living(scratch) == set(), within_s=5, what="all have ended")
    of_next = Scratch(os.environ)
    assert not scratch.exists()
    assert left(token) == []
    of_next.remove()


@pytest.mark.slow
def test_a_server_that_lives_without_guard_and_owner_keeps_what_it_has(tmp_path: Path, token: str) -> None:
    owner, scratch, group = _owner(tmp_path, token)
    try:
        owner.send_signal(signal.SIGSTOP)
        os.kill(group, signal.SIGKILL)  # the guard alone
        owner.kill()
        owner.wait()
        Scratch(os.environ).remove()
        assert len(left(token)) == 2
        assert [path.name for path in scratch.glob(f"{token}*")] != []
    finally:
        os.killpg(group, signal.SIGKILL)
    wait_until(lambda: scratch_module._living(scratch) == set(), within_s=5, what="all have ended")
    Scratch(os.environ).remove()
    assert not scratch.exists()


def test_nobody_waits_long_for_processes_that_do_not_end(
    tmp_path: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with much memory may take many seconds to end. What it leaves goes when it has."""
    server = LeavingServer(tmp_path, token)
    monkeypatch.setattr(scratch_module, "_END_WITHIN_S", 0.1)
    server.scratch.remove()
    assert len(left(token)) == 2
    os.killpg(server.process.pid, signal.SIGKILL)
    wait_until(lambda: not server.scratch.folder.exists(), within_s=20, what="the folder goes")
    assert left(token) == []
    server.process.end()


def test_another_server_keeps_what_it_has(tmp_path: Path, token: str) -> None:
    of_another = secrets.token_hex(4)
    server, another = LeavingServer(tmp_path, token), LeavingServer(tmp_path, of_another)
    try:
        _kill_all(server)
        assert len(left(of_another)) == 2
        assert another.scratch.folder.exists()
    finally:
        another.process.end()
    assert left(of_another) == []


def test_what_a_server_only_reads_stays(tmp_path: Path, token: str) -> None:
    """Weights that somebody has put into shared memory, and a queue that another process has made."""
    for name in (f"model-{token}.safetensors", f"sgl_shm_mq_{os.getpid()}_{token}"):
        stays = SHARED_MEMORY / name
        stays.write_bytes(b"weights")
        server = LeavingServer(tmp_path, token, "opens", name)
        _kill_all(server)
        assert left(token) == [name]
        stays.unlink()


def test_a_name_that_another_has_taken_since_is_not_removed(tmp_path: Path, token: str) -> None:
    server = LeavingServer(tmp_path, token)
    os.killpg(server.process.pid, signal.SIGKILL)
    (load,) = SHARED_MEMORY.glob(f"sglang_loads_{token}*")
    load.unlink()
    load.write_bytes(b"of another")
    server.process.end()
    assert left(token) == [load.name]


def test_what_a_living_process_has_open_goes_when_it_has_ended(tmp_path: Path, token: str) -> None:
    """Two processes of one server on the same host, as two nodes: the first that ends has made what the other still has."""
    server = LeavingServer(tmp_path, token)
    (name,) = (name for name in left(token) if name.startswith("sgl_shm_mq"))
    with (SHARED_MEMORY / name).open("rb"):
        _kill_all(server)
        assert left(token) == [name]
    Scratch(os.environ).remove()
    assert left(token) == []
    assert not server.scratch.folder.exists()


def test_servers_that_die_and_are_started_again_do_not_add_up(tmp_path: Path, token: str) -> None:
    for _ in range(3):
        server = LeavingServer(tmp_path, token)
        _kill_all(server)
        assert left(token) == []
        assert not server.scratch.folder.exists()


def test_temporary_files_are_in_the_folder_and_compiled_kernels_are_kept(tmp_path: Path) -> None:
    base = Path(os.environ.get("TMPDIR", "/tmp"))
    scratch = Scratch({"TMPDIR": str(base), "OTHER": "1"})
    within = Scratch(scratch.environment)  # a trainer that was started so starts servers
    try:
        assert scratch.environment["TMPDIR"] == str(scratch.folder)
        assert scratch.environment["OTHER"] == "1"
        assert within.folder.parent == scratch.folder.parent == base
        kept = Path(scratch.environment["TORCHINDUCTOR_CACHE_DIR"])
        assert kept.parent == base
        assert within.environment["TORCHINDUCTOR_CACHE_DIR"] == str(kept), "what was set before is kept"
    finally:
        scratch.remove()
        within.remove()


def test_sockets_have_room_in_the_folder(tmp_path: Path) -> None:
    """A socket's path has 107 characters, and servers talk by sockets in TMPDIR."""
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    scratch = Scratch({"TMPDIR": str(deep)})
    assert len(f"{scratch.folder}/torch-shm-dir-XXXXXX/manager.sock") <= 107
    scratch.remove()
    missing = Scratch({"TMPDIR": str(tmp_path / "missing")})
    assert missing.folder.exists()
    missing.remove()


def test_a_link_by_the_name_of_a_folder_leads_nowhere(tmp_path: Path) -> None:
    """Anybody may make one in a folder that all users have for temporary files."""
    (tmp_path / "work").write_text("of months")
    scratch = Scratch(os.environ)
    link = scratch.folder.with_name(f"{scratch_module._prefix()}{secrets.token_hex(4)}")
    link.symlink_to(tmp_path)
    try:
        scratch.remove()
        assert (tmp_path / "work").read_text() == "of months"
    finally:
        link.unlink()


def test_a_command_that_cannot_be_started_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch(os.environ)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(Exception, match="cannot be started"):
        GuardedProcess(["true"], tmp_path / "log", {}, scratch=scratch)
    assert not scratch.folder.exists()


def test_looking_costs_nothing_where_nothing_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done five times a second for the life of a server, and a process's mappings are long."""
    scratch = Scratch(os.environ)
    notes = scratch_module.Notes(scratch.folder)
    strangers = SHARED_MEMORY / f"sglang_loads_{secrets.token_hex(4)}.shm"
    strangers.write_bytes(b"")
    try:
        deadline = time.monotonic() + 20
        looked = []
        monkeypatch.setattr(scratch_module, "_opened_by", lambda pid: looked.append(pid) or set())
        while time.monotonic() < deadline:
            before = len(looked)
            notes.look()
            if len(looked) == before and looked:
                break
        assert looked
        assert len(looked) == before, "a file of somebody else's is looked for again and again"
    finally:
        strangers.unlink()
        (scratch.folder / "session").unlink()  # which is this process's
        scratch.remove()
