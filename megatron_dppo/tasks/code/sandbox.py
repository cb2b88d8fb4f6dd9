"""Runs a program that nobody trusts, with limits, and ends everything that it started.

With ``namespaces`` the kernel gives it a world of its own: no network, no processes but its own, a file system that is
read-only but for one small folder in memory, and none of the home folder, /tmp, /run or /proc. It needs user namespaces,
which container runtimes often forbid; nothing weaker is used in their place unless ``process`` is asked for. docs/grading.md
says what each does not protect from.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pwd
import select
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_dppo.errors import TaskError

ISOLATIONS = ("namespaces", "process")

_LAUNCHER = Path(__file__).with_name("launcher.py")
_START_S = 60.0  # on a busy node, until the program itself starts
_HIDDEN = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/var/run")


@dataclass(frozen=True)
class Limits:
    """What one run of a program may use.

    Attributes:
        seconds: by the clock, and of each process's time on the processor.
        memory_bytes: address space of each process.
        folder_bytes: of all files it writes, which are in memory (process: of each file).
        processes: at once, threads included.
        output_bytes: on standard output and standard error together.
    """

    seconds: float
    memory_bytes: int = 1 << 30
    folder_bytes: int = 64 << 20
    processes: int = 32
    output_bytes: int = 4 << 20


@dataclass(frozen=True)
class RunResult:
    """How a program ended.

    Attributes:
        ended: exit, by itself, or by a signal or a limit of the kernel | timeout | output: it wrote too much.
        code: its exit code, 128 + n for signal n; 0 only for exit.
        stdout: what it wrote, as far as it was read.
        stderr: the end of that.
    """

    ended: Literal["exit", "timeout", "output"]
    code: int
    stdout: bytes
    stderr: str


class SandboxError(RuntimeError):
    """The program was not started; the message says what the system refused."""


def run_sandboxed(
    program: Sequence[str], files: Mapping[str, str], stdin: str, limits: Limits, isolation: str = "namespaces"
) -> RunResult:
    """Run this interpreter with the arguments ``program`` in a folder that holds ``files``.

    Raises SandboxError if it could not be started. Whatever it started has ended on return: all of it with ``namespaces``,
    with ``process`` what did not leave its process group.
    """
    with contextlib.ExitStack() as cleanup:
        folder = os.path.realpath("/tmp")
        if isolation == "process":
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="program_", ignore_cleanup_errors=True))
        job = _job(program, files, stdin, limits, isolation, folder)
        status, theirs = os.pipe()
        cleanup.callback(os.close, status)
        with contextlib.closing(_memory_file(json.dumps(job).encode())) as text:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", str(_LAUNCHER), str(theirs)],
                    stdin=text,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=[theirs],
                    env={},
                    start_new_session=True,
                )
            finally:
                os.close(theirs)
        with process:
            try:
                _await_start(status)
                return _watch(process, limits)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def check_isolation(isolation: str) -> None:
    """Raise TaskError, with the remedy, if programs cannot be run that way on this machine."""
    if isolation not in ISOLATIONS:
        raise TaskError(f"isolation {isolation!r} is unknown; choose {' or '.join(ISOLATIONS)}")
    try:
        result = run_sandboxed(["-S", "-c", "print(42)"], {}, "", Limits(seconds=10.0), isolation)
    except SandboxError as error:
        raise TaskError(
            f"isolation {isolation}: this machine does not allow it ({error}). Allow user namespaces (in a container: run it"
            " with CAP_SYS_ADMIN, or with a seccomp profile that allows unshare and mount), or set isolation: process and"
            " read in docs/grading.md what that does not protect from"
        ) from error
    if (result.code, result.stdout) != (0, b"42\n"):
        raise TaskError(
            f"isolation {isolation}: a first program failed with code {result.code}: {result.stderr.strip()}"
        )


def _job(
    program: Sequence[str], files: Mapping[str, str], stdin: str, limits: Limits, isolation: str, folder: str
) -> dict[str, Any]:
    processes = limits.processes if isolation == "namespaces" else limits.processes + _threads_of_this_user()
    return {
        "isolation": isolation,
        "arguments": [sys.executable, *program],
        "environment": {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": folder,
            "TMPDIR": folder,
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",  # the same grade for the same program
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        "folder": folder,
        "folder_bytes": limits.folder_bytes,
        "files": dict(files),
        "stdin": stdin,
        "hide": _hidden_folders(),
        "keep": _interpreter_folders(),
        "limits": {
            "RLIMIT_CPU": math.ceil(limits.seconds) + 1,
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_FSIZE": limits.folder_bytes,
            "RLIMIT_NPROC": processes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        },
    }


def _hidden_folders() -> list[str]:
    homes = [os.path.expanduser("~")]
    with contextlib.suppress(KeyError):
        homes.append(pwd.getpwuid(os.getuid()).pw_dir)
    found = {os.path.realpath(folder) for folder in (*_HIDDEN, *homes) if os.path.isdir(folder)} - {"/"}
    # One inside another is hidden with it.
    return sorted(folder for folder in found if not any(folder.startswith(f"{other}/") for other in found))


def _interpreter_folders() -> list[tuple[str, str]]:
    """(source, target) of the folders that Python needs and that are hidden otherwise."""
    hidden = tuple(f"{folder}/" for folder in _hidden_folders())
    prefixes = {path for prefix in (sys.prefix, sys.base_prefix) for path in (prefix, os.path.realpath(prefix))}
    return sorted((os.path.realpath(path), path) for path in prefixes if path.startswith(hidden))


def _threads_of_this_user() -> int:
    """The limit on processes counts all of a user's."""
    count = 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and entry.stat().st_uid == os.getuid():
                count += len(os.listdir(f"{entry.path}/task"))
    return count


def _memory_file(content: bytes) -> Any:
    file = open(os.memfd_create("job"), "r+b")  # noqa: SIM115  closed by the caller
    file.write(content)
    file.seek(0)
    return file


def _await_start(status: int) -> None:
    """Wait until the program itself runs: what the preparations take is not its time."""
    reason, deadline = b"", time.monotonic() + _START_S
    while select.select([status], [], [], max(deadline - time.monotonic(), 0.0))[0]:
        piece = os.read(status, 1000)
        reason += piece
        if not piece:
            if reason:
                raise SandboxError(reason.decode(errors="replace"))
            return
    raise SandboxError(f"it was not ready after {_START_S:.0f} s")


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> RunResult:
    """Read what the program writes until it ends or has to be ended."""
    assert process.stdout is not None
    assert process.stderr is not None
    stdout, stderr, total = bytearray(), b"", 0
    deadline = time.monotonic() + limits.seconds
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(deadline - time.monotonic(), 0.0))
            if not ready:
                return RunResult("timeout", 128 + signal.SIGKILL, bytes(stdout), _tail(stderr))
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 16)
                total += len(piece)
                if not piece:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    stdout += piece
                else:
                    stderr = (stderr + piece)[-4000:]
                if total > limits.output_bytes:
                    return RunResult("output", 128 + signal.SIGKILL, bytes(stdout), _tail(stderr))
    try:
        code = process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:  # it closed its output and went on
        return RunResult("timeout", 128 + signal.SIGKILL, bytes(stdout), _tail(stderr))
    return RunResult("exit", code if code >= 0 else 128 - code, bytes(stdout), _tail(stderr))


def _tail(text: bytes) -> str:
    return text[-2000:].decode(errors="replace")
