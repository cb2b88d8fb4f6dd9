"""What the host offers: ports, disk, shared memory, open files, a clock that agrees with the disk's."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

import torch

from megatron_dppo.distributed.open_files import make_room_for_requests
from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.doctor.lines import Line, Subject
from megatron_dppo.rollout.sglang.servers.server import free_port

_RENDEZVOUS_PORT = 29500  # torchrun's
_GIB = 2**30
_WRITTEN = 8 * 2**20  # bytes: past the buffers of a small file, and done in a moment on anything usable
_SLOW = 20e6  # bytes a second: a checkpoint of 8 billion parameters (112 GB) would take an hour and a half
_LEAST_FREE = 2 * _GIB  # logs, metrics, samples
_CHECKPOINT_PER_WEIGHT_BYTE = 7  # bf16 weight 2 bytes; beside it fp32 weight and two moments
_SHARED_MEMORY = _GIB
_CLOCK_S = 5.0


def ports(_: Subject) -> list[Line]:
    """One for a server, outside of the range that the system gives away; and the one that ranks meet at."""
    lines = [Line("server port", "ok", f"{free_port()} is free, outside of the range that the system gives away")]
    port = int(os.environ.get("MASTER_PORT", _RENDEZVOUS_PORT))
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the rendezvous does
        try:
            listener.bind(("", port))
            lines.append(Line("rendezvous port", "ok", f"{port} is free"))
        except OSError as error:
            remedy = "torchrun --rdzv-endpoint HOST:OTHER_PORT, or --standalone on one host"
            lines.append(Line("rendezvous port", "note", f"{port}: {error.strerror}", remedy))
    return lines


def disk(subject: Subject) -> list[Line]:
    """Room for one checkpoint, and the speed at which it would be written."""
    root, free = subject.root, shutil.disk_usage(subject.root).free
    needed = _LEAST_FREE + _checkpoint_bytes(subject)
    found = f"{free / _GIB:.1f} GiB free at {root}"
    remedy = "run.root=FOLDER on a larger disk"
    enough = free >= needed
    lines = [
        Line(
            "disk room",
            "ok" if enough else "error",
            found if enough else f"{found}, one checkpoint needs {needed / _GIB:.1f}",
            "" if enough else remedy,
        )
    ]
    try:
        speed, skew = _write_speed_and_skew(root)
    except OSError as error:
        return [
            *lines,
            Line(
                "disk speed",
                "error",
                f"{root} cannot be written: {error.strerror}",
                "run.root=FOLDER that this user owns",
            ),
        ]
    slow = speed < _SLOW
    lines.append(
        Line(
            "disk speed",
            "note" if slow else "ok",
            f"{speed / 1e6:.0f} MB/s, written through",
            "checkpoints will take long: another run.root" if slow else "",
        )
    )
    apart = skew > _CLOCK_S
    lines.append(
        Line(
            "clock",
            "note" if apart else "ok",
            f"{skew:.1f} s from that of the disk",
            "synchronise the hosts (chrony, ntpd)" if apart else "",
        )
    )
    return lines


def _checkpoint_bytes(subject: Subject) -> int:
    folder = Path(subject.recipe.model.path) if subject.is_named else None
    files = folder.glob("*.safetensors") if folder is not None and folder.is_dir() else ()
    return _CHECKPOINT_PER_WEIGHT_BYTE * sum(file.stat().st_size for file in files)


def _write_speed_and_skew(root: Path) -> tuple[float, float]:
    """Bytes a second, and seconds between this host's clock and the one that dates files there."""
    with tempfile.NamedTemporaryFile(dir=root, prefix=".doctor_") as file:
        began = time.monotonic()
        file.write(os.urandom(_WRITTEN))
        file.flush()
        os.fsync(file.fileno())
        took = time.monotonic() - began
        return _WRITTEN / took, abs(os.stat(file.name).st_mtime - time.time())


def shared_memory(_: Subject) -> Line:
    """NCCL and data loaders put what processes of a host share there; containers get 64 MiB unless told otherwise."""
    size = shutil.disk_usage("/dev/shm").total
    found = f"/dev/shm has {size / _GIB:.2f} GiB"
    if size >= _SHARED_MEMORY:
        return Line("shared memory", "ok", found)
    return Line(
        "shared memory",
        "error" if torch.cuda.is_available() else "note",
        found,
        "docker run --shm-size=16g, or --ipc=host",
    )


def open_files(subject: Subject) -> Line:
    """As many as requests are in flight."""
    count = subject.recipe.rollout.sglang.max_concurrent_requests
    try:
        make_room_for_requests(count)
    except ConfigError as error:
        fault, _, remedy = str(error).partition(": ")
        return Line("open files", "error", fault, remedy)
    return Line("open files", "ok", f"enough for {count} requests at once")
