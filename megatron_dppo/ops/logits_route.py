"""Which of the two ways through logits is taken, where the gradient may be made in forward: the one place that decides.

==========  ============================  =======================================================
way         passes over the memory        what it needs
==========  ============================  =======================================================
two passes  a read; a read and a write    nothing
one pass    a read and a write            every row under way stays in a cache until its gradient is made
==========  ============================  =======================================================

A worker (a multiprocessor, or a thread of a CPU) takes a row at a time and reads it twice. One pass is taken where both hold,
else two passes are made:

* a row fits into what a worker has of the second-level cache, or rather into ``_C.cache_share`` of that: 310 KiB on an H100
  (50 MiB for 132 multiprocessors), where the 297 KiB of 151,936 columns in bf16 fit and those in fp32 do not. The core of a
  CPU has 1 or 2 MiB of its own;
* there are rows enough for all workers to be busy. With ``_ROWS_PER_WORKER`` rows each, a last one that keeps a single worker
  busy costs a ninth of the time; two passes cut rows into segments where there are fewer.
"""

from __future__ import annotations

import torch

from megatron_dppo.ops.backend import Backend

_ROWS_PER_WORKER = 8


def takes_one_pass(logits: torch.Tensor, vocab_size: int, backend: Backend) -> bool:
    """Whether ``gradient_over_logits`` can be called, and pays.

    Args:
        logits: [..., V] of the whole vocabulary; no values are read. Two passes for such as need no gradient, and for a leaf
            or a view of one, whose values are not to be lost in a forward.
        vocab_size: true columns.
        backend: that computes it. Plain torch has one way.
    """
    if backend.operators is None or logits.device.type not in ("cpu", "cuda"):  # tensors without values have no cache
        return False
    if torch.compiler.is_compiling():  # a graph decides itself when a tensor is overwritten
        return False
    if not torch.is_grad_enabled() or not logits.requires_grad or _owner(logits).is_leaf:
        return False
    workers, bytes_of_each = _workers(logits.device)
    return (
        vocab_size * logits.element_size() <= bytes_of_each and logits.shape[:-1].numel() >= _ROWS_PER_WORKER * workers
    )


def _owner(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that this one is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def _workers(device: torch.device) -> tuple[int, float]:
    """How many rows are computed at a time, and the bytes of second-level cache that each of them may take."""
    import megatron_dppo._C as _C  # only where the kernels are in use

    if device.type == "cpu":
        return torch.get_num_threads(), _C.cache_share * _C.cpu_l2_bytes
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, _C.cache_share * found.L2_cache_size / found.multi_processor_count
