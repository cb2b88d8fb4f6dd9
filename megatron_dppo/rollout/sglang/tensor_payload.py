"""What ``/update_weights_from_tensor`` is given: not the bytes of a bucket, but where another process finds them.

On a GPU that is a CUDA IPC handle, with the GPU's UUID in the place of its number, as the server may count GPUs differently.
On a CPU, which has no such handles, it is the name of a file in shared memory. SGLang unpickles it, for which none of its
classes is needed: the trainer does without SGLang.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing import reductions

from megatron_dppo.models.hf.export import NamedShape

_DEVICE = 6  # which of rebuild_cuda_tensor's arguments: SGLang puts UUIDs there as well


class _Result:
    """Pickled as a call: whoever unpickles it gets what ``function(*arguments)`` gives there."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def handle_of(flat: torch.Tensor) -> str:
    """Where another process finds [n] uint8, for one use. The memory has to stay until it was used."""
    if flat.is_cuda:
        arguments = list(reductions.reduce_tensor(flat)[1])
        arguments[_DEVICE] = str(torch.cuda.get_device_properties(flat.device).uuid)
        return _encoded(("cuda", arguments))
    storage = flat.untyped_storage()
    place = storage._share_filename_cpu_()  # its bytes move there the first time
    storage._shared_incref()  # on behalf of the one who will open it
    return _encoded(("cpu", [*place, len(flat)]))


def _encoded(content: Any) -> str:
    return base64.b64encode(pickle.dumps(content)).decode()


def payload(handle: str, tensors: Sequence[NamedShape], dtype: torch.dtype) -> str:
    """One entry of ``serialized_named_tensors`` in load_format ``flattened_bucket``: what one rank of a server gets.

    Args:
        handle: of the bucket, from ``handle_of`` on any process.
        tensors: what the bucket holds, one after the other.
        dtype: of all of them.
    """
    content = {"flattened_tensor": _opened(handle), "metadata": _metadata(tensors, dtype)}
    return _encoded(content)


def _opened(handle: str) -> _Result:
    device, arguments = pickle.loads(base64.b64decode(handle))
    if device == "cuda":
        return _Result(reductions.rebuild_cuda_tensor, *arguments)
    *place, length = arguments
    bare = _Result(reductions.rebuild_storage_filename, torch.UntypedStorage, *place)
    storage = _Result(reductions.rebuild_typed_storage, bare, torch.uint8)
    return _Result(reductions.rebuild_tensor, torch.Tensor, storage, (0, torch.Size([length]), (1,), False))


def _metadata(tensors: Sequence[NamedShape], dtype: torch.dtype) -> list[SimpleNamespace]:
    """With the fields of SGLang's FlattenedTensorMetadata; ``numel`` is in bytes there."""
    entries, start = [], 0
    for name, shape in tensors:
        size = torch.Size(shape).numel() * dtype.itemsize
        entries.append(
            SimpleNamespace(
                name=name, shape=torch.Size(shape), dtype=dtype, start_idx=start, end_idx=start + size, numel=size
            )
        )
        start += size
    return entries
