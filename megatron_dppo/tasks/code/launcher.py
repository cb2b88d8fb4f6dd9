"""Shuts itself in, then becomes the program: run by ``sandbox.py`` as a process of its own, with the standard library alone.

``python launcher.py STATUS`` reads a job as JSON from standard input. STATUS is a file descriptor for the reason why the
program could not be started; it is closed when the program starts.

    outer (new namespaces)  ->  first process of the process namespace  ->  the program

When the first process of a process namespace ends, the kernel kills all others in it, whatever they did to get away. Each of
the three dies with the one before it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import sys
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)

# From the kernel's headers; Python has names for few of them.
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # NS UTS IPC USER PID NET
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 1 << 18
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1

_NOBODY = 65534
_SPARE_IDS = 1_900_000_000  # far above what systems give to people
_FAILED = 125


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def main(status: int, job: dict[str, Any]) -> None:
    """Never returns."""
    os.set_inheritable(status, False)
    try:
        _die_with_parent()
        if job["isolation"] == "namespaces":
            identity = _enter_namespaces()
            _replace_folders(job)
            _hand_over_to_first_process(status)
            _become(job, identity)
        _become(job, None)
    except OSError as error:
        os.write(status, f"{error.strerror or error}".encode())
    os._exit(_FAILED)


def _die_with_parent() -> None:
    _check(_LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _enter_namespaces() -> int | None:
    """The user to become before the program starts, if it is another one.

    Limits on the number of processes do not hold for root, so that its programs run as a user that nobody else is; only a
    process outside can say so.
    """
    user, group = os.getuid(), os.getgid()
    if user != 0:
        _check(_LIBC.unshare(_NEW_NAMESPACES), "unshare")
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{_NOBODY} {user} 1")
        _write("/proc/self/gid_map", f"{_NOBODY} {group} 1")
        return None
    ours = os.getpid()
    ready, go = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.read(ready, 1)
        os._exit(0 if any(_map_ids(ours, spare) for spare in (_SPARE_IDS + ours, _NOBODY)) else 1)
    try:
        _check(_LIBC.unshare(_NEW_NAMESPACES), "unshare")
    finally:
        os.write(go, b"x")
        failed = os.waitpid(helper, 0)[1]
    if failed:
        raise OSError(errno.EPERM, "no user is left to run programs as")
    return _NOBODY


def _map_ids(process: int, spare: int) -> bool:
    try:
        for kind in ("uid_map", "gid_map"):
            _write(f"/proc/{process}/{kind}", f"0 0 1\n{_NOBODY} {spare} 1")
    except OSError:
        return False
    return True


def _replace_folders(job: dict[str, Any]) -> None:
    """Everything read-only; the folders to hide empty, but for what the interpreter needs; one folder that can be written."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("none", "/proc", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m")
    for index, (source, _) in enumerate(job["keep"]):
        os.mkdir(f"/proc/{index}")
        _mount(source, f"/proc/{index}", None, _MS_BIND | _MS_REC)
    for folder in job["hide"]:
        size = job["folder_bytes"] if folder == job["folder"] else 1 << 20
        mode = "1777" if folder == job["folder"] else "755"
        _mount("none", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size},mode={mode}")
    for index, (_, target) in enumerate(job["keep"]):
        os.makedirs(target, exist_ok=True)
        _mount(f"/proc/{index}", target, None, _MS_BIND | _MS_REC)
    _mount("none", "/proc", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=4k")
    os.umask(0o022)
    _write_files(job)
    _set_mount("/", _AT_RECURSIVE, _MountAttributes(set=_MOUNT_ATTR_RDONLY))
    _set_mount(job["folder"], 0, _MountAttributes(clear=_MOUNT_ATTR_RDONLY))


def _hand_over_to_first_process(status: int) -> None:
    """Return in the process that is to become the program; the two above it wait for it."""
    for _ in range(2):
        child = os.fork()
        if child:
            os.close(status)
            _wait_and_exit(child)
        _die_with_parent()


def _wait_and_exit(child: int) -> None:
    while True:
        ended, status = os.wait()
        if ended == child:  # the first process is also the parent of orphans
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _become(job: dict[str, Any], user: int | None) -> None:
    if job["isolation"] == "process":
        _write_files(job)
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        _die_with_parent()  # a change of user resets it
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    os.chdir(job["folder"])
    text = os.memfd_create("stdin")
    with open(text, "wb", closefd=False) as file:
        file.write(job["stdin"].encode())
    os.lseek(text, 0, os.SEEK_SET)
    os.dup2(text, 0)
    for name, value in job["limits"].items():
        _, highest = resource.getrlimit(getattr(resource, name))
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        resource.setrlimit(getattr(resource, name), (value, value))
    os.execve(job["arguments"][0], job["arguments"], job["environment"])


def _write_files(job: dict[str, Any]) -> None:
    for name, text in job["files"].items():
        _write(os.path.join(job["folder"], name), text)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _check(_LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def _set_mount(path: str, flags: int, attributes: _MountAttributes) -> None:
    size = ctypes.sizeof(attributes)
    done = _LIBC.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, ctypes.byref(attributes), size)
    _check(done, f"mount_setattr {path}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.stdin.buffer.read()))
