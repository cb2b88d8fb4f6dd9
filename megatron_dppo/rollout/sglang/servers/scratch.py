"""What a group of processes leaves on its host, removed once all of them have ended, however that came about.

SGLang unlinks little: every start of a server leaves five files or sockets in the folder for temporary files and one file
in /dev/shm, and a server that is killed the segments by which its processes talk, of 25 MB each. So its processes have a
folder of their own, by way of TMPDIR, and in it stands which files in shared memory they have made. Names alone would not
do: most say nothing of their maker, and containers that share /dev/shm give the same process ids. So the guard, which is
one of the group, looks what the processes of its session have open, and notes what is of a kind that they make for
themselves, by its inode. What a living process has open is never removed.

Whoever made the folder removes it, at the end of the group; if processes take long to end, as they do with much memory, one
that it leaves behind. If the maker was killed, one that the guard leaves behind; if the guard was, too, whoever makes such a
folder next on this host, or removes one: a folder is locked as long as its maker or its guard lives.

Standard library only: this is also what the guard runs, which must not take the seconds and the memory of imports.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
# Of files that a process makes for itself and for those that it starts, or, the last, for one peer that it waits for.
_KINDS = [
    re.compile(r"sgl_shm_\w+_(?P<pid>\d+)_[0-9a-f]{8}"),  # SGLang: queues between ranks, and the like
    re.compile(r"multi_tokenizer_args_(?P<pid>\d+)"),  # SGLang
    re.compile(r"sglang_loads_.*\.shm"),  # SGLang: its load, for /v1/loads
    re.compile(r"torch_(?P<pid>\d+)_\d+_\d+"),  # torch: tensors that are shared by file
    re.compile(r"sem\.mp-\w{8}"),  # Python: semaphores of processes that were spawned
    re.compile(r"nccl-\w{6}"),  # NCCL: until both sides have it
]
_PREFIX = "mdppo-"
_SESSION, _NOTES = "session", "shared_memory"  # files in the folder
_LONGEST_SOCKET_PATH = 107
_LONGEST_BELOW = len("/torch-shm-dir-XXXXXX/manager.sock")
_LOOKS = 10  # a file that nobody of ours has opened by then is somebody else's
_END_WITHIN_S = 5.0  # of processes that were killed
_LEFT_BEHIND_FOR_S = 60.0
_ASK_AGAIN_S = 0.05


class Scratch:
    """Made before the group is started, by the process that ends it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Makes the folder, where ``environment`` has temporary files, and removes others whose processes have all ended.

        Attributes: ``environment``: for the processes, by which they find it. ``folder``. ``lock``: for the guard to inherit.
        """
        base = _base(environment)
        _sweep(base)
        self.folder, self.lock = _locked_folder(base)
        # What is compiled is to outlive the processes: where torch would have it without a folder of their own.
        kept = {"TORCHINDUCTOR_CACHE_DIR": str(base / f"torchinductor_{_user()}")}
        self.environment = {**kept, **environment, "TMPDIR": str(self.folder)}

    def remove(self) -> None:
        """Remove what the processes left, when they have ended; they were told to, or killed. Safe to call twice."""
        if self.lock < 0:
            return
        deadline = time.monotonic() + _END_WITHIN_S
        while (alive := _living(self.folder)) and time.monotonic() < deadline:
            time.sleep(_ASK_AGAIN_S)
        if not alive:
            _remove(self.folder)
        os.close(self.lock)
        self.lock = -1
        if alive:
            leave_behind(self.folder)
        _sweep(self.folder.parent)


class Notes:
    """Of the guard: which files in shared memory the processes of its session have made."""

    def __init__(self, folder: Path) -> None:
        """``folder``: of the ``Scratch``."""
        self._folder = folder
        self._ours: dict[int, str] = {}  # inode -> name
        self._looks: dict[int, int] = {}  # inode -> how often nobody of ours had it open
        with contextlib.suppress(OSError):
            (folder / _SESSION).write_text(str(os.getsid(0)))

    def look(self) -> None:
        """Called again and again while they live."""
        with contextlib.suppress(OSError):  # no shared memory, or the folder is gone: no reason to end a server
            self._look()

    def _look(self) -> None:
        there = {entry.inode(): entry.name for entry in os.scandir(_SHARED_MEMORY)}
        ours = {inode: name for inode, name in self._ours.items() if inode in there}
        self._looks = {inode: looks for inode, looks in self._looks.items() if inode in there}
        new = {inode for inode in there.keys() - ours.keys() if self._looks.get(inode, 0) < _LOOKS}
        kinds = {inode: kind for inode in new if (kind := _kind(there[inode])) is not None}
        self._looks.update(dict.fromkeys(new - kinds.keys(), _LOOKS))
        members = _members(os.getsid(0)) if kinds else set()
        opened: dict[int, set[str]] = {}
        for inode, kind in kinds.items():
            pid = kind.groupdict().get("pid")
            makers = members if pid is None else members & {int(pid)}
            for maker in makers - opened.keys():
                opened[maker] = _opened_by(maker)
            if any(there[inode] in opened[maker] for maker in makers):
                ours[inode] = there[inode]
            else:
                self._looks[inode] = self._looks.get(inode, 0) + 1 if makers else _LOOKS
        if ours != self._ours:
            self._ours = ours
            written = self._folder / f"{_NOTES}.new"
            written.write_text("".join(f"{inode} {name}\n" for inode, name in ours.items()))
            written.rename(self._folder / _NOTES)


def leave_behind(folder: Path) -> None:
    """Start a process that removes the folder once its processes have ended and nobody has it locked any more."""
    nothing = subprocess.DEVNULL  # whoever reads what the caller says is not to wait for it
    # Not of the group, and not to be found by what marks the group's environment.
    command = [sys.executable, __file__, str(folder)]
    subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, env={}, start_new_session=True)


def _kind(name: str) -> re.Match[str] | None:
    return next((match for pattern in _KINDS if (match := pattern.fullmatch(name))), None)


def _remove(folder: Path) -> None:
    """Everything of processes that have ended. What somebody else has open stays, noted, for the next who looks."""
    notes = _lines(folder / _NOTES)
    left = []
    opened = set().union(*map(_opened_by, _processes())) if notes else set()
    for inode, name in (line.split(" ", 1) for line in notes):
        path = _SHARED_MEMORY / name
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino != int(inode):
                continue
            if name in opened:
                left.append(f"{inode} {name}\n")
            else:
                path.unlink()
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (_SESSION, _NOTES):
            path.unlink(missing_ok=True)
    if left:
        (folder / _NOTES).write_text("".join(left))
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_ended(folder: Path) -> bool:
    """Whether it is gone. It is not touched while its maker, its guard or one of its processes lives."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _living(folder):
            _remove(folder)
        return not folder.exists()
    except OSError:  # it is locked, or cannot be
        return False
    finally:
        os.close(lock)


def _sweep(base: Path) -> None:
    """Remove the folders, of this user and this host, of those that have ended and were not there to do it."""
    for folder in base.glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.getuid():  # not what somebody's link leads to
                _remove_if_ended(folder)


def _locked_folder(base: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(), dir=base))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # a file system without locks: nobody else will remove it
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)  # it was taken for an abandoned one before it was locked


def _base(environment: Mapping[str, str]) -> Path:
    """Where the folders lie: never in one another, so that they can be removed in any order."""
    base = Path(environment.get("TMPDIR", ""))
    if not base.is_absolute() or not base.is_dir():
        base = Path(tempfile.gettempdir())
    base = next((folder.parent for folder in (base, *base.parents) if folder.name.startswith(_PREFIX)), base)
    longest = len(f"{base}/{_prefix()}XXXXXXXX") + _LONGEST_BELOW
    return base if longest <= _LONGEST_SOCKET_PATH else Path("/tmp")


def _prefix() -> str:
    """Of this start of this host: the folder for temporary files may be one that hosts share."""
    return f"{_PREFIX}{Path('/proc/sys/kernel/random/boot_id').read_text()[:8]}-"


def _user() -> str:
    with contextlib.suppress(KeyError, OSError):
        return getpass.getuser()
    return str(os.getuid())


def _living(folder: Path) -> set[int]:
    """The processes of the group that was given this folder."""
    session = _lines(folder / _SESSION)
    return _members(int(session[0])) if session else set()


def _members(session: int) -> set[int]:
    """Processes of this session, and what they have started in other ones, apart from those that only wait to be reaped."""
    processes = {pid: stat for pid, stat in _processes().items() if stat[0] not in "ZX"}
    members, found = set(), {pid for pid, (_, _, of) in processes.items() if of == session}
    while found:
        members |= found
        found = {pid for pid, (_, parent, _) in processes.items() if parent in found} - members
    return members


def _processes() -> dict[int, tuple[str, int, int]]:
    """pid -> (state, parent, session), as proc(5) has them."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            state, parent, _, session = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:4]
            found[int(entry)] = (state, int(parent), int(session))
    return found


def _opened_by(pid: int) -> set[str]:
    """Names of the files in shared memory that a process has open or mapped; none if that is not ours to know."""
    names = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            path = line.partition("/")[2]
            if path.startswith("dev/shm/"):
                names.add(path.removeprefix("dev/shm/"))
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                path = os.readlink(entry.path)
                if path.startswith("/dev/shm/"):
                    names.add(path.removeprefix("/dev/shm/"))
    return names


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().splitlines()
    return []


def main() -> None:
    """What is left behind: remove a folder as soon as its processes have ended."""
    folder, deadline = Path(sys.argv[1]), time.monotonic() + _LEFT_BEHIND_FOR_S
    while not _remove_if_ended(folder) and time.monotonic() < deadline:
        time.sleep(_ASK_AGAIN_S)


if __name__ == "__main__":
    main()
