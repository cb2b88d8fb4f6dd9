"""What is installed: Python, torch, Megatron-core and what it builds on, this package's extension, SGLang."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from megatron_dppo.compat.optional_dependencies import (
    Availability,
    probe_apex,
    probe_transformer_engine,
    probe_weight_gradient_fusion,
)
from megatron_dppo.launch.doctor.lines import Line, Subject
from megatron_dppo.ops.backend import backend_report, cpu_kernel_level

_PYTHONS = ((3, 10), (3, 13))  # first, and first that is too new
_CORES = ((0, 16), (0, 20))
_OLDEST_TORCH = (2, 6)
_PATIENCE_S = 30.0


def python(_: Subject) -> Line:
    """As setup.py asks for it."""
    found = f"{platform.python_version()} ({sys.executable})"
    if _PYTHONS[0] <= sys.version_info[:2] < _PYTHONS[1]:
        return Line("python", "ok", found)
    return Line("python", "error", found, "use Python 3.10, 3.11 or 3.12")


def torch_version(_: Subject) -> Line:
    """Not older than setup.py allows."""
    found = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if numbers(torch.__version__) < _OLDEST_TORCH:
        return Line("torch", "error", found, "pip install 'torch>=2.6'")
    return Line("torch", "ok", found)


def megatron_core(_: Subject) -> Line:
    """Within the range that is tested."""
    remedy = "pip install 'megatron-core>=0.16,<0.20'"
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return Line("megatron-core", "error", "not installed", remedy)
    if _CORES[0] <= numbers(version) < _CORES[1]:
        return Line("megatron-core", "ok", version)
    return Line("megatron-core", "error", f"{version} is outside of 0.16 to 0.19", remedy)


def transformer_engine(_: Subject) -> Line:
    """Without it a run on GPUs has to ask for Megatron's own layers: right, and slower."""
    remedy = "pip install --no-build-isolation 'transformer-engine[pytorch]', or run with model.backend=local"
    return _optional("transformer-engine", probe_transformer_engine(), remedy)


def apex(_: Subject) -> Line:
    """NVIDIA's, not the toolkit that PyPI has under that name."""
    spec = PathFinder.find_spec("apex")
    if spec is not None and not any(
        (Path(place) / "normalization").is_dir() for place in spec.submodule_search_locations or ()
    ):
        where = spec.origin or "its folder"
        return Line(
            "apex",
            "note",
            f"{where} is not NVIDIA's Apex; it is ignored",
            "pip uninstall apex; or build NVIDIA's from source",
        )
    return _optional("apex", probe_apex(), "build NVIDIA's Apex with --cpp_ext --cuda_ext")


def weight_gradient_fusion(_: Subject) -> Line:
    """Part of NVIDIA's Apex."""
    return _optional(
        "gradient fusion", probe_weight_gradient_fusion(), "build NVIDIA's Apex with its weight-gradient kernel"
    )


def _optional(what: str, found: Availability, remedy: str) -> Line:
    if found.usable:
        return Line(what, "ok", found.reason)
    return Line(what, "note", found.reason, remedy if torch.cuda.is_available() else "")


def gpus(_: Subject) -> Line:
    """What torch sees, and the driver under it."""
    seen, driver = torch.cuda.device_count() if torch.cuda.is_available() else 0, _driver()
    if seen:
        names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(seen)}))
        return Line("GPUs", "ok", f"{seen} x {names}, driver {driver or 'unknown'}")
    if driver is None:
        return Line("GPUs", "note", "none on this host: everything runs on the CPU")
    if torch.version.cuda is None:
        return Line(
            "GPUs",
            "error",
            f"driver {driver}, but torch {torch.__version__} is built without CUDA",
            "install a CUDA build of torch",
        )
    return Line(
        "GPUs",
        "error",
        f"driver {driver}, but torch sees no GPU",
        f"a driver for CUDA {torch.version.cuda} or newer; see CUDA_VISIBLE_DEVICES and the container's --gpus",
    )


def _driver() -> str | None:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(asked.stdout.split()), None)


def extension(_: Subject) -> Line:
    """Compiled for this torch, this processor and these GPUs."""
    report, build = backend_report(), "MEGATRON_DPPO_BUILD_EXT=1 pip install --no-build-isolation ."
    if report["cpu"] != "available":  # not built: plain torch is slower, and right
        return Line("extension", "note" if "is not built" in report["cpu"] else "error", report["cpu"], build)
    from megatron_dppo import _C  # it loads, as the report says

    found = (
        f"CPU kernels for {cpu_kernel_level() or 'the compiler target'}, CUDA kernels for {_C.cuda_archs or 'nothing'}"
    )
    if not _C.cpu_level_is_supported:
        return Line("extension", "error", f"{found}: this processor lacks that level", f"on this processor: {build}")
    if torch.cuda.is_available():
        missing = [gpu for gpu in _architectures() if not is_covered(gpu, _C.cuda_archs)]
        if missing:
            names = ", ".join(f"{major}.{minor}" for major, minor in missing)
            wanted = ";".join(f"{major}{minor}" for major, minor in missing)
            remedy = f"MEGATRON_DPPO_CUDA_ARCHS='{wanted}' {build}"
            return Line("extension", "error", f"{found}, not for this host's GPUs ({names})", remedy)
    return Line("extension", "ok", found)


def _architectures() -> list[tuple[int, int]]:
    return sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})


def is_covered(gpu: tuple[int, int], architectures: str) -> bool:
    """Whether code for ``80;90a;100+PTX`` runs on a GPU of this compute capability.

    Machine code runs on the same major number and the same or a higher minor one; with an ``a`` on that very one. PTX is
    compiled on anything newer.
    """
    for architecture in filter(None, architectures.split(";")):
        name, ptx = architecture.removesuffix("+PTX"), architecture.endswith("+PTX")
        number = int(name.rstrip("af"))
        built = (number // 10, number % 10)
        if built == gpu or (name.isdigit() and ((built[0] == gpu[0] and built <= gpu) or (ptx and built <= gpu))):
            return True
    return False


def numbers(version: str) -> tuple[int, int]:
    """Major and minor number: ``"2.13.0+cpu"`` -> (2, 13)."""
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int("".join(character for character in minor if character.isdigit()) or 0)
