"""Loaded by Python at start-up in a CPU server's process: three small adjustments made when a module is first imported.

* The torchvision wheel on the package index is linked against CUDA, so beside a CPU torch its operators do not load and
  its import stops at "operator torchvision::nms does not exist". SGLang imports it but calls no image operator for a
  language model, so declaring the two operators that the import looks up is enough.
* SGLang reports SHA-256 of a parameter in the memory of a CPU, which no two ranks can compute together. It is made to report
  the hash that it has for a GPU, by the library that MEGATRON_DPPO_TILE_HASH_LIBRARY names (csrc/server), else in torch.
* SGLang honours a request's sampling seed only in its batch-invariant mode, which needs GPU kernels. With the
  environment variable MEGATRON_DPPO_SEEDED_SAMPLING set, the sampler alone is told that the mode is on.
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


sys.meta_path.insert(0, _BeforeTorchvision())
sys.meta_path.insert(0, _After("sglang.srt.utils.weight_checker", _hash_as_on_a_gpu))
if os.environ.get("MEGATRON_DPPO_SEEDED_SAMPLING"):
    sys.meta_path.insert(0, _After("sglang.srt.sampling.sampling_batch_info", _seed_sampling))
