"""Everything that megatron-core needs to run on CPU tensors and the gloo backend; nothing of it is used with CUDA.

megatron-core (0.16 to 0.19) is written for CUDA, but nearly all of its CUDA-specific code is about *where* a tensor
lives, not what is computed. The redirections below send those requests to the CPU, so that every parallel layout can be
run and tested without a GPU. Each one names the place in core that needs it (paths below megatron/core) and why.

They replace attributes of ``torch.cuda`` and a few functions of core for the whole process: on a machine without CUDA the
originals could only raise.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

_CPU = torch.device("cpu")
_enabled = False


def enable_megatron_on_cpu() -> bool:
    """Redirect core's CUDA requests to the CPU. Returns False, and does nothing, where CUDA is available.

    May be called any number of times; ``initialize_model_parallel`` and ``build_policy`` call it.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if not _enabled:
        _redirect_device_queries()
        _redirect_tensor_factories()
        _redirect_streams_and_events()
        _redirect_random_state()
        _redirect_tensor_type_names()
        _redirect_moe_dispatch()
        _redirect_uneven_collectives()
        _enabled = True
    return True


def _redirect_device_queries() -> None:
    """``torch.cuda.current_device()`` and ``synchronize()``.

    Where: tensor_parallel/mappings.py and layers.py (output buffers), pipeline_parallel/p2p_communication.py (receive
    buffers, synchronize after a batch of sends), distributed/param_and_grad_buffer.py (gradient buffers),
    models/common/embeddings/rotary_pos_embedding.py, transformer/moe/router.py, parallel_state.py.
    Why: they ask for the current CUDA device; on a CPU machine the current device is the CPU.
    """
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None


def _redirect_tensor_factories() -> None:
    """``torch.zeros(..., device="cuda")`` and its siblings, ``pin_memory=True``, ``Tensor.cuda()``.

    Where: pipeline_parallel/schedules.py (total_num_tokens), optimizer/optimizer.py (found_inf, scales),
    optimizer/clip_grads.py (grad norm), tensor_parallel/data.py, models/common/language_module/language_module.py
    (weight.data.cuda()), dist_checkpointing/exchange_utils.py.
    Why: the device is hard-coded.
    """
    # ``with torch.device("meta"):`` remembers at its first use which functions create tensors, as attributes of torch. Let
    # it remember the originals: ours call those, and would otherwise be taken out of its reach.
    with torch.device("cpu"):
        torch.empty(0)
    for name in ("zeros", "ones", "empty", "full", "tensor", "arange", "zeros_like", "ones_like", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


class _Event:
    """A CUDA event on a machine where everything is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: Any) -> float:
        return 0.0


class _Stream:
    """The one stream that there is: all instances are equal, as core compares current and side stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def _redirect_streams_and_events() -> None:
    """``torch.cuda.Stream``, ``Event``, ``current_stream``, ``default_stream``, ``stream``, ``set_stream``.

    Where: transformer/moe/token_dispatcher.py (device-to-host side stream), distributed/param_and_grad_buffer.py
    (communication stream), pipeline_parallel/utils.py.
    Why: overlap of copies and computation; a CPU does both in order.
    """
    torch.cuda.Stream = _Stream  # type: ignore[assignment, misc]
    torch.cuda.Event = _Event  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda device=None: _Stream()  # type: ignore[assignment, return-value]
    torch.cuda.default_stream = lambda device=None: _Stream()  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment, return-value]
    torch.cuda.set_stream = lambda stream: None


def _redirect_random_state() -> None:
    """The CUDA random-state tracker works on the CPU generator.

    Where: tensor_parallel/random.py (CudaRNGStatesTracker.add and fork, model_parallel_cuda_manual_seed, checkpoint),
    rerun_state_machine.py (get_rng_state).
    Why: the tracker saves, sets and restores the CUDA generator; dropout and initialisation draw from the CPU's here.
    ``fork`` logs a warning when the CPU state changes inside it, which is the point on a CPU: only that one is dropped.
    """
    import megatron.core.tensor_parallel.random as core_random

    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    def set_core_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_rng_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = (
        lambda new_state, device=None: torch.set_rng_state(new_state)  # type: ignore[assignment, misc]
    )
    torch.cuda.manual_seed = torch.cuda.random.manual_seed = manual_seed
    core_random._set_cuda_rng_state = set_core_rng_state
    logging.getLogger(core_random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _redirect_tensor_type_names() -> None:
    """``Tensor.type()`` answers ``torch.cuda.FloatTensor`` to the optimizer, for a CPU tensor and one without values.

    Where: optimizer/optimizer.py, distrib_optimizer.py and clip_grads.py compare ``param.type()`` with the names of CUDA
    tensor types, and raise for any other.
    Why: a comparison of strings is the only thing in the way; only calls from that folder are answered differently.
    """
    type_name = torch.Tensor.type

    def type_as_core_expects(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_name(self, *args, **kwargs)
        caller = sys._getframe(1).f_code.co_filename.replace("\\", "/")
        if not args and not kwargs and "megatron/core/optimizer" in caller and isinstance(answer, str):
            return answer.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_as_core_expects  # type: ignore[method-assign, assignment]


def _redirect_moe_dispatch() -> None:
    """The alltoall token dispatcher's split sizes.

    Where: transformer/moe/moe_utils.py. ``maybe_move_tensor_to_cpu`` converts to numpy only what ``.is_cuda``, but
    torch.distributed.all_to_all_single needs plain numbers whatever the device.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = move_to_cpu


def _redirect_uneven_collectives() -> None:
    """All-gather and reduce-scatter of shards of unequal length.

    Where: tensor_parallel/mappings.py, with split sizes given: the alltoall dispatcher with expert tensor parallelism.
    Why: gloo wants equal lengths. Shards are padded to the longest, gathered and cut; the reduce-scatter is an
    all-reduce of everything, of which each rank keeps its part.
    """
    import megatron.core.tensor_parallel.mappings as mappings

    gather_even, reduce_scatter_even = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(
        input_: torch.Tensor,
        group: Any = None,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather_even(input_, group, output_split_sizes, use_global_buffer)
        lengths = [int(length) for length in output_split_sizes]
        padded = input_.new_zeros((max(lengths), *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        shards = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(shards, padded, group=group)
        return torch.cat([shard[:length] for shard, length in zip(shards, lengths, strict=True)])

    def reduce_scatter(
        input_: torch.Tensor,
        group: Any = None,
        input_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter_even(input_, group, input_split_sizes, use_global_buffer)
        total = input_.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split([int(length) for length in input_split_sizes])[group.rank()].contiguous()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter
