"""Loaded by Python at start-up in a CPU server's process: small adjustments made when a module is first imported.

* The torchvision wheel on the package index is linked against CUDA, so beside a CPU torch its operators do not load and
  its import stops at "operator torchvision::nms does not exist". SGLang imports it but calls no image operator for a
  language model, so declaring the two operators that the import looks up is enough.
* SGLang reports SHA-256 of a parameter in the memory of a CPU, which no two ranks can compute together. It is made to report
  the hash that it has for a GPU, by the library that MEGATRON_DPPO_TILE_HASH_LIBRARY names (csrc/server), else in torch.
* SGLang honours a request's sampling seed only in its batch-invariant mode, which needs GPU kernels. With the
  environment variable MEGATRON_DPPO_SEEDED_SAMPLING set, the sampler alone is told that the mode is on.
* With DP attention, idle ranks ask the attention backend for a number that only backends of GPUs have.
* With expert parallelism, a token's choice of another rank's expert has the number -1, which the CPU's experts take for a
  wrong index: they are made to leave it out.
* SGLang spawns its processes, as CUDA does not survive a fork, and each imports everything anew: 10 s of a core. Without CUDA
  they are forked, with what the first process has imported.
"""

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators at its first import: importing torch any earlier would slow every process."""

    library: Any = None  # kept alive here: the declarations end with the library object

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            type(self).library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return


class _After(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module as usual and changes it then."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self._name = name
        self._change = change

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.machinery.PathFinder.find_spec(fullname, path)
        self.loader: Any = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.loader.exec_module(module)
        self._change(module)


def _hash_as_on_a_gpu(weight_checker: Any) -> None:
    """Replace the hash by which the module that answers /weights_checker identifies a parameter."""
    path = Path(__file__).parents[1] / "tile_hash_reference.py"  # by its path: this process has no megatron_dppo
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    reference: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    library = os.environ.get("MEGATRON_DPPO_TILE_HASH_LIBRARY")
    compiled: Any = ctypes.CDLL(library).megatron_dppo_tile_hash if library else None
    if compiled is not None:
        compiled.argtypes, compiled.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64

    def tensor_hash(tensor: Any) -> int:
        words = reference.words_of(tensor)
        if compiled is not None:
            return int(compiled(words.data_ptr(), words.numel()))
        return int(reference.checksum(words), 16)

    weight_checker.tensor_hash = tensor_hash


def _seed_sampling(sampling_batch_info: Any) -> None:
    """Replace the view that the module, which collects a batch's sampling parameters, has of the execution mode."""
    real_get_exec = sampling_batch_info.get_exec

    class SeededExecution:
        deterministic = types.SimpleNamespace(enable_deterministic_inference=True)

        def __getattr__(self, name: str) -> Any:
            return getattr(real_get_exec(), name)

    sampling_batch_info.get_exec = SeededExecution


def _lend_a_sequence_length(torch_native_backend: Any) -> None:
    """What the backends of GPUs say to the same question."""
    torch_native_backend.TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda _self: 1


def _leave_out_experts_of_others(fused_moe_native: Any) -> None:
    """Replace the experts' forward pass for batches in which some choices are of experts that other ranks have."""
    import torch
    from torch.nn import functional

    real_forward = fused_moe_native.moe_forward_native

    def moe_forward_native(layer: Any, x: Any, topk_output: Any, config: Any) -> Any:
        weights, chosen, _ = topk_output
        if not bool((chosen < 0).any()):
            return real_forward(layer, x, topk_output, config)
        result = torch.zeros(x.shape, dtype=torch.float32)
        for expert, (gate_up, down) in enumerate(zip(layer.w13_weight, layer.w2_weight, strict=True)):
            choices = chosen == expert
            rows = choices.any(1).nonzero()[:, 0]
            gate, up = functional.linear(x[rows], gate_up).chunk(2, -1)
            outputs = functional.linear(functional.silu(gate) * up, down).float()
            result[rows] += outputs * (weights * choices).sum(1)[rows, None]
        return result.to(x.dtype)

    fused_moe_native.moe_forward_native = moe_forward_native


def _fork_processes(engine: Any) -> None:
    """Replace what the module that starts the other processes sees of multiprocessing."""
    import multiprocessing

    class Forking(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(multiprocessing, name)

        def set_start_method(self, method: str, force: bool = False) -> None:
            multiprocessing.set_start_method("fork", force=force)

    engine.mp = Forking("multiprocessing")


sys.meta_path.insert(0, _BeforeTorchvision())
sys.meta_path.insert(0, _After("sglang.srt.layers.attention.torch_native_backend", _lend_a_sequence_length))
sys.meta_path.insert(0, _After("sglang.srt.layers.moe.fused_moe_native", _leave_out_experts_of_others))
sys.meta_path.insert(0, _After("sglang.srt.utils.weight_checker", _hash_as_on_a_gpu))
sys.meta_path.insert(0, _After("sglang.srt.entrypoints.engine", _fork_processes))
if os.environ.get("MEGATRON_DPPO_SEEDED_SAMPLING"):
    sys.meta_path.insert(0, _After("sglang.srt.sampling.sampling_batch_info", _seed_sampling))
