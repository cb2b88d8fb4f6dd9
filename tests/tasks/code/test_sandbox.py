"""What a program that nobody trusts can do to the machine that grades it: with namespaces, next to nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.code.sandbox import Limits, RunResult, SandboxError, check_isolation, run_sandboxed
from tests.tasks.code.isolations import ISOLATIONS
from tests.waiting import wait_until

needs_namespaces = pytest.mark.skipif("namespaces" not in ISOLATIONS, reason="this system forbids user namespaces")


def run(program: str, isolation: str = "namespaces", stdin: str = "", seconds: float = 10.0) -> RunResult:
    limits = Limits(seconds=seconds, memory_bytes=512 << 20, folder_bytes=4 << 20, processes=16, output_bytes=1 << 20)
    return run_sandboxed(["-s", "-B", "p.py"], {"p.py": program}, stdin, limits, isolation)


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize(
    ("program", "ended", "code", "stdout"),
    [
        ("print(int(input()) + 1)", "exit", 0, b"42\n"),
        ("raise SystemExit(3)", "exit", 3, b""),
        ("import os; os.kill(os.getpid(), 11)", "exit", 128 + 11, b""),
        ("import os; print(1, flush=True); os._exit(0)", "exit", 0, b"1\n"),
        ("print(1, flush=True)\nwhile True: pass", "timeout", 128 + 9, b"1\n"),
        ("import os, time; os.close(1); os.close(2); time.sleep(60)", "timeout", 128 + 9, b""),
        ("bytearray(2 << 30)", "exit", 1, b""),
        ("open('big', 'wb').write(bytes(8 << 20))", "exit", 1, b""),
        ("open('small', 'wb').write(bytes(1 << 20)); print(1)", "exit", 0, b"1\n"),
        ("files = [open('p.py') for _ in range(100)]", "exit", 1, b""),
    ],
)
def test_a_program_ends_within_its_limits(isolation: str, program: str, ended: str, code: int, stdout: bytes) -> None:
    start = time.monotonic()
    result = run(program, isolation, stdin="41\n", seconds=1.0 if ended == "timeout" else 20.0)
    assert (result.ended, result.code, result.stdout) == (ended, code, stdout), result.stderr
    assert time.monotonic() - start < 20.0


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_read_up_to_a_limit(isolation: str, stream: str) -> None:
    result = run(f"import sys\nwhile True: sys.{stream}.write('x' * 1000)", isolation)
    assert result.ended == "output"
    assert len(result.stdout) <= (1 << 20) + (1 << 16)
    assert len(result.stderr) <= 2000


@needs_namespaces
def test_a_fork_bomb_is_small_and_ends_whole() -> None:
    bomb = """
import os, time
made = 0
try:
    while made < 100:
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        made += 1
except OSError:
    print(made)
"""
    result = run(bomb)
    assert result.ended == "exit"
    assert 0 < int(result.stdout) < 16
    assert wait_until(lambda: not _processes_of("p.py"), within_s=10, what="the bomb's processes end")


def _processes_of(name: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
        except OSError:
            continue
        found += [entry.name] if name.encode() in arguments else []
    return found


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_secrets_in_the_environment_do_not_reach_a_program(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hunter2")
    assert run("import os; print('API_KEY' in os.environ, len(os.environ) < 12)", isolation).stdout == b"False True\n"


@needs_namespaces
def test_a_program_sees_no_processes_no_network_and_no_files_of_ours(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2")
    home = os.path.expanduser("~")
    probe = f"""
import os, socket
def attempt(name, action):
    try:
        print(name, action())
    except OSError as error:
        print(name, type(error).__name__)
print("processes", os.listdir("/proc"), os.getppid())
attempt("environment", lambda: open("/proc/{os.getpid()}/environ").read())
attempt("kill", lambda: os.kill({os.getpid()}, 0))
attempt("file", lambda: open({str(tmp_path / "secret")!r}).read())
attempt("home", lambda: [n for n in os.listdir({home!r}) if not n.startswith(".pyenv")] and "full" or "empty")
attempt("write", lambda: open("/etc/written", "w"))
attempt("network", lambda: socket.create_connection(("127.0.0.1", 1), 1))
attempt("remount", lambda: __import__("ctypes").CDLL(None).umount(b"/tmp"))
"""
    lines = run(probe).stdout.decode().splitlines()
    assert lines[5] in ("write OSError", "write PermissionError")  # a read-only file system
    assert [*lines[:5], *lines[6:]] == [
        "processes [] 1",
        "environment FileNotFoundError",
        "kill ProcessLookupError",
        "file FileNotFoundError",
        "home empty",
        "network OSError",
        "remount -1",
    ]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_program_ends_with_the_process_that_grades_it(isolation: str) -> None:
    """kill -9 of a scoring worker leaves nothing behind."""
    script = (
        "from megatron_dppo.tasks.code.sandbox import Limits, run_sandboxed\n"
        "program = {'left_behind.py': 'import time; time.sleep(600)'}\n"
        f"run_sandboxed(['-s', '-B', 'left_behind.py'], program, '', Limits(seconds=600), {isolation!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    grader = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        wait_until(lambda: bool(_processes_of("left_behind.py")), within_s=60, what="the program starts")
    finally:
        grader.kill()
        grader.wait()
    wait_until(lambda: not _processes_of("left_behind.py"), within_s=10, what="the program ends")


def test_what_cannot_be_isolated_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskError, match="isolation 'docker' is unknown; choose namespaces or process"):
        check_isolation("docker")
    monkeypatch.setattr("megatron_dppo.tasks.code.sandbox._hidden_folders", lambda: ["/no/such/folder"])
    with (
        pytest.raises(SandboxError, match="mount /no/such/folder: No such file")
        if "namespaces" in ISOLATIONS
        else (pytest.raises(SandboxError))
    ):
        run("print(1)")
    with pytest.raises(TaskError, match=r"does not allow it .*or set isolation: process"):
        check_isolation("namespaces")
