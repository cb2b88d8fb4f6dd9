"""Joining the ranks that torchrun started: device, backend, threads, and a clean end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_dppo.distributed.collectives import sum_over_ranks
from megatron_dppo.distributed.lifeline import Lifeline
from megatron_dppo.errors import ConfigError, StopRequested


def world_size() -> int:
    """Number of ranks that torchrun announces (1 without it)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's global rank (0 without torchrun)."""
    return int(os.environ.get("RANK", "0"))


def choose_device(wanted: str) -> torch.device:
    """``auto`` takes the GPU of this local rank if there is one. Raises ConfigError if what is wanted is not there."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        if torch.cuda.is_available():
            raise ConfigError(
                "run.device=cpu on a machine with GPUs: hide them from the run with CUDA_VISIBLE_DEVICES='' (Megatron-core"
                " takes a visible GPU wherever there is one)"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("run.device=cuda, but torch sees no GPU; use run.device=cpu or install a CUDA build of torch")
    if torch.cuda.device_count() < local_world_size:
        raise ConfigError(
            f"{local_world_size} processes on this node but {torch.cuda.device_count()} GPU(s): start one process per GPU"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def joined_ranks(device: torch.device, timeout_s: float = 1800.0) -> Iterator[Lifeline]:
    """Within this context the default process group exists; gloo carries CPU tensors and objects, NCCL GPU tensors.

    To be left by all ranks together: without an error, or by StopRequested. If a rank leaves with another error, the others
    are ended (lifeline.py) and groups are left as they are: taking them down is collective.
    """
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if world_size() == 1 else "29500")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        backend = "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    request: StopRequested | None = None
    try:
        with Lifeline(rank(), world_size()) as lifeline:
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
