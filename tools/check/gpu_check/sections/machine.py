"""What is there: device, versions, what is optional, which kernels can be used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_dppo.compat.optional_dependencies import probe_apex, probe_transformer_engine
from megatron_dppo.ops.backend import backend_report, cpu_kernel_level
from tools.check.gpu_check.findings import Check, Finding, Options

TOOLKIT_PROGRAMS = ("nvcc", "compute-sanitizer", "ncu")


def checks(options: Options) -> list[Check]:
    """Nothing here takes long."""
    return [
        Check("device", lambda: device(options), 60.0),
        Check("software", software, 120.0),
        Check("backend", lambda: backend(options), 60.0),
    ]


def device(options: Options) -> Finding:
    if not options.on_gpu:
        return Finding(f"CPU, {os.cpu_count()} cores, {cpu_kernel_level()}", values={"cores": os.cpu_count() or 0})
    count, properties = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
    figures = (
        f"{count} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs, "
        f"driver {driver()}"
    )
    return Finding(figures, values={"gpus": count, "name": properties.name, "bytes": properties.total_memory})


def driver() -> str:
    """The driver's version, by nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (nvidia-smi does not answer)"
    return (done.stdout.split("\n")[0].strip() or "unknown") if done.returncode == 0 else "unknown"


def software() -> list[Finding]:
    names = ("megatron-core", "transformers", "triton", "liger-kernel")
    found = {name: version(name) for name in names}
    listed = ", ".join(f"{name} {number}" for name, number in found.items())
    python, cuda = platform.python_version(), torch.version.cuda
    programs = {name: find_program(name) or "absent" for name in TOOLKIT_PROGRAMS}
    return [
        Finding(f"Python {python}, torch {torch.__version__}, CUDA {cuda}, {listed}", name="versions", values=found),
        Finding(f"{probe_transformer_engine().reason}; {probe_apex().reason}", name="optional kernels"),
        Finding(", ".join(f"{name}: {path}" for name, path in programs.items()), name="programs", values=programs),
    ]


def version(name: str) -> str:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def find_program(name: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or in one of the places where toolkits lie."""
    candidates = [shutil.which(name)]
    for home in filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda")):
        candidates += [str(Path(home, folder, name)) for folder in ("bin", "compute-sanitizer")]
    candidates += sorted(map(str, _nsight_compute(name)), reverse=True)
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def _nsight_compute(name: str) -> Iterator[Path]:
    return Path("/opt/nvidia/nsight-compute").glob(f"*/{name}")


def backend(options: Options) -> Finding:
    """Without its kernels everything would still run, in plain torch: that is no pass."""
    state = backend_report()[options.device]
    return Finding(state, state == "available")
