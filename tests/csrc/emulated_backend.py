"""The backend ``emulated``: the CUDA kernels behind the operators, on a CPU, so that tests of ops/ and loss/ run on them.

Operators, argument checks and launches are those of csrc/operators, compiled for the emulated machine of
tests/csrc/emulation; they take tensors on the CPU for such on a GPU. Says nothing about speed, nor about the device's own
exponential function.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BUILD = Path(__file__).with_name("emulation") / "build.sh"
CUDA_HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include/cuda_runtime_api.h"
OBJECTS = ROOT / "build" / "emulation"  # kept: what has not changed is not compiled again
NAMESPACE = "megatron_dppo_emulated"


def why_not() -> str | None:
    """Why the kernels cannot be emulated here; None if they can."""
    if shutil.which("g++") is None:
        return "no g++ on this machine"
    if not CUDA_HEADERS.exists():
        return f"no CUDA toolkit headers ({CUDA_HEADERS}); set CUDA_HOME"
    if not (ROOT / "csrc").exists():
        return "csrc/ is not beside the tests"
    return None


@cache
def load() -> None:
    """Compile the operators, if that was not done, and let ``backend="emulated"`` find them."""
    from megatron_dppo.ops.backend import add_backend
    from megatron_dppo.ops.native_backend import NativeBackend, register_shapes

    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "operators.so"
        _compile(library)
        torch.ops.load_library(str(library))
    register_shapes(NAMESPACE)
    add_backend(NativeBackend("emulated", NAMESPACE))


def _compile(library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    environment = {
        **os.environ,
        "TORCH_INCLUDES": " ".join(f"-isystem {path}" for path in include_paths()),
        "TORCH_LIBRARIES": " ".join(f"-L{path}" for path in library_paths()) + " -lc10 -ltorch_cpu -ltorch",
    }
    command = [str(BUILD), "operators", str(library), str(ROOT / "csrc"), str(OBJECTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the emulated kernels do not compile:\n{done.stderr}")
