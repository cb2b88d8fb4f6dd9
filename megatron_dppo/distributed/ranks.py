"""Joining the ranks that torchrun started: device, backend, threads, and a clean end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_dppo.distributed.collectives import sum_over_ranks
from megatron_dppo.distributed.host_group import made_host_group
from megatron_dppo.distributed.lifeline import Lifeline
from megatron_dppo.distributed.open_files import make_room_for_sockets
from megatron_dppo.errors import ConfigError, StopRequested

# Of collectives on tensors, where every rank comes within seconds of the others.
COLLECTIVE_TIMEOUT_S = 1800.0
# Groups over gloo that a rank is in, as if each were of all ranks. With NCCL: host_group, and that of the checkpoint thread.
# Without: the default group and Megatron's too.
_MESHES_WITH_NCCL, _MESHES_WITH_GLOO = 2, 20


def world_size() -> int:
    """Number of ranks that torchrun announces (1 without it)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of them on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """This process's global rank (0 without torchrun)."""
    return int(os.environ.get("RANK", "0"))


def choose_device(wanted: str) -> torch.device:
    """``auto`` takes the GPU of this local rank if there is one. Raises ConfigError if what is wanted is not there."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        if torch.cuda.is_available():
            raise ConfigError(
                "run.device=cpu on a machine with GPUs: hide them from the run with CUDA_VISIBLE_DEVICES='' (Megatron-core"
                " takes a visible GPU wherever there is one)"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("run.device=cuda, but torch sees no GPU; use run.device=cpu or install a CUDA build of torch")
    if torch.cuda.device_count() < local_world_size():
        raise ConfigError(
            f"{local_world_size()} processes on this node but {torch.cuda.device_count()} GPU(s): start one process per GPU"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def joined_ranks(
    device: torch.device, *, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S, host_timeout_s: float | None = None
) -> Iterator[Lifeline]:
    """Within this context the default process group exists, over NCCL for GPUs, else gloo, and ``host_group`` for values.

    Args:
        device: of this rank.
        collective_timeout_s: how long ranks wait for each other in the default group, for tensors.
        host_timeout_s: and in ``host_group``, where they wait for whoever does something alone. None: as long.

    To be left by all ranks together: without an error, or by StopRequested. If a rank leaves with another error, the others
    are ended (lifeline.py) and groups are left as they are: taking them down is collective.
    """
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if world_size() == 1 else "29500")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_world_size()))
    on_gpu = device.type == "cuda"
    make_room_for_sockets(_MESHES_WITH_NCCL if on_gpu else _MESHES_WITH_GLOO, world_size())
    # With its device named, NCCL connects now: a network that does not work is found here, not in the first step. Groups of
    # its ranks are split off it from then on, in which all ranks have to take part (rollout/sglang/update_group.py).
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=collective_timeout_s),
        device_id=device if on_gpu else None,
    )
    request: StopRequested | None = None
    try:
        host_timeout = collective_timeout_s if host_timeout_s is None else host_timeout_s
        with made_host_group(host_timeout), Lifeline(rank(), world_size()) as lifeline:
            try:
                yield lifeline
            except StopRequested as asked:
                request = asked
            sum_over_ranks([0.0])  # nobody takes down what others still use
    except BaseException:
        if world_size() == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
    if request is not None:
        raise request
