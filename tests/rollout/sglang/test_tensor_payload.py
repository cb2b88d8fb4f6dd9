"""A bucket is handed over as the place where it is: another process finds its bytes there, and nothing is left behind."""

from __future__ import annotations

import base64
import gc
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from megatron_dppo.models.hf.export import NamedShape
from megatron_dppo.rollout.sglang import tensor_payload
from megatron_dppo.rollout.sglang.tensor_payload import handle_of, payload
from tests.waiting import wait_until

TENSORS = [NamedShape("a", (2, 3)), NamedShape("b", (4,))]
# Only torch: what unpickles it is a server, which has none of this package.
READER = """
import base64, pickle, sys, torch
content = pickle.loads(base64.b64decode(sys.stdin.read()))
flat = content["flattened_tensor"]
for meta in content["metadata"]:
    assert meta.numel == meta.end_idx - meta.start_idx
    print(meta.name, *flat[meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape).flatten().tolist())
del flat, content  # a process that ends with it does not say so
"""


def _read(text: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", READER], input=text, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_another_process_finds_what_the_memory_holds_now() -> None:
    """The memory is used again for the next bucket; a place is handed over once for each who uses it."""
    buffer = torch.empty(64, dtype=torch.uint8)
    flat = buffer[:20]
    for first in (0, 100):
        values = torch.arange(first, first + 10, dtype=torch.bfloat16)
        flat.copy_(values.view(torch.uint8))
        a, b = values[:6].tolist(), values[6:].tolist()
        for text in [payload(handle_of(flat), TENSORS, torch.bfloat16) for _ in range(2)]:
            assert _read(text).splitlines() == [" ".join(map(str, ["a", *a])), " ".join(map(str, ["b", *b]))]


def test_the_memory_is_gone_when_nobody_has_it_any_more() -> None:
    flat = torch.zeros(1000, dtype=torch.uint8)
    text = payload(handle_of(flat), [NamedShape("a", (1000,))], torch.uint8)
    (file,) = Path("/dev/shm").glob(f"torch_{os.getpid()}_*")
    _read(text)
    del flat
    gc.collect()
    wait_until(lambda: not file.exists(), within_s=10, what=f"the end of {file}")


class _Calls(pickle.Unpickler):
    """Finds (name, arguments) instead of calling what the names stand for."""

    def find_class(self, module: str, name: str) -> Any:
        if module == reductions.__name__:
            return lambda *arguments: (name, arguments)
        return super().find_class(module, name)


def test_a_gpu_is_named_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server counts GPUs in its own way. (Made up: there is no GPU here.)"""
    flat: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 3))
    arguments = (torch.Tensor, torch.Size([8]), (1,), 0, torch.TypedStorage, torch.uint8, 3, b"handle", 8, 0, False)
    reduced = (reductions.rebuild_cuda_tensor, (*arguments, b"counter", 0, b"event", True))
    monkeypatch.setattr(tensor_payload.reductions, "reduce_tensor", lambda tensor: reduced)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    text = payload(handle_of(flat), [NamedShape("a", (8,))], torch.uint8)
    content = _Calls(io.BytesIO(base64.b64decode(text))).load()
    name, found = content["flattened_tensor"]
    assert name == "rebuild_cuda_tensor"
    assert found[6] == "GPU-3"
    assert (*found[:6], *found[7:]) == (*arguments[:6], *arguments[7:], b"counter", 0, b"event", True)
