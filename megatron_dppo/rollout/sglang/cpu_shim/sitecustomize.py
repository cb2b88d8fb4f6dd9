"""Loaded by Python at start-up in a CPU server's process: two small adjustments made when a module is first imported.

* The torchvision wheel on the package index is linked against CUDA, so beside a CPU torch its operators do not load and
  its import stops at "operator torchvision::nms does not exist". SGLang imports it but calls no image operator for a
  language model, so declaring the two operators that the import looks up is enough.
* SGLang honours a request's sampling seed only in its batch-invariant mode, which needs GPU kernels. With the
  environment variable MEGATRON_DPPO_SEEDED_SAMPLING set, the sampler alone is told that the mode is on.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
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


class _AfterSamplingBatchInfo(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the module that collects a batch's sampling parameters and replaces its view of the execution mode."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "sglang.srt.sampling.sampling_batch_info":
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
        real_get_exec = module.get_exec

        class SeededExecution:
            deterministic = types.SimpleNamespace(enable_deterministic_inference=True)

            def __getattr__(self, name: str) -> Any:
                return getattr(real_get_exec(), name)

        module.get_exec = SeededExecution


sys.meta_path.insert(0, _BeforeTorchvision())
if os.environ.get("MEGATRON_DPPO_SEEDED_SAMPLING"):
    sys.meta_path.insert(0, _AfterSamplingBatchInfo())
