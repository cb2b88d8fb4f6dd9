"""The CPU kernels compiled for one level of x86-64, as in the extension, and called from Python.

Levels that this processor lacks run on an emulated one where there is bochscpu. ``None`` is the code of other processors:
the compiler's own target and no clones.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).parents[2] / "csrc"
SHIM = Path(__file__).with_name("cpu_levels")
CPUINFO = Path("/proc/cpuinfo")
SOURCES = ("row_partials", "merge_partials", "tile_nodes", "policy_backward", "shard_divergence", "tile_hash")
IS_X86_64 = platform.machine() == "x86_64"
# What gcc and the C library mean by a level, as far as the kernels' code can need it.
PROCESSOR_FLAGS = {
    "x86-64": set(),
    "x86-64-v3": {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"},
    "x86-64-v4": {"avx2", "fma", "bmi2", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
LEVELS: tuple[str | None, ...] = (None, *PROCESSOR_FLAGS) if IS_X86_64 else (None,)


def load_build() -> ModuleType:
    """csrc/build_extension.py, which is no package's module."""
    spec = importlib.util.spec_from_file_location("build_extension", CSRC / "build_extension.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing_flags(level: str | None) -> set[str]:
    """What this processor lacks of a level."""
    if level in (None, "x86-64"):
        return set()
    return PROCESSOR_FLAGS[level] - set(CPUINFO.read_text(encoding="utf-8").split())


class LevelLibrary:
    """Kernels by name: ``library("row_partials", PartialsArguments(...))``."""

    def __init__(self, path: Path, emulated: bool) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self._processor = None
        if emulated:
            from tests.csrc.emulated_processor import EmulatedProcessor

            self._processor = EmulatedProcessor()

    def __call__(self, kernel: str, arguments: ctypes.Structure) -> None:
        self.library.forget_allocations()
        function = getattr(self.library, kernel)
        if self._processor is None:
            function(ctypes.byref(arguments))
        else:
            self._processor.call(function, ctypes.addressof(arguments))


def why_not(level: str | None) -> str | None:
    """Why kernels of a level cannot be run here, not even emulated; None if they can."""
    missing = missing_flags(level)
    if not missing or (sys.platform == "linux" and importlib.util.find_spec("bochscpu") is not None):
        return None
    return (
        f"the {level} kernels were not run: this processor has no {', '.join(sorted(missing))}, and there is no emulated "
        "one (pip install bochscpu-python==0.3.1)"
    )


def compile_level(level: str | None, output: Path, fused_multiply_add: bool = True) -> LevelLibrary:
    """Compile the kernels with the extension's flags; ``fused_multiply_add`` off keeps multiply and add two roundings."""
    build = load_build()
    sources = [*(CSRC / f"cpu/{name}.cpp" for name in SOURCES), SHIM / "launchers.cpp"]
    macro = "-DDPPO_NO_CPU_CLONES" if level is None else f'-DDPPO_CPU_LEVEL="{level}"'
    contraction = [] if fused_multiply_add else ["-ffp-contract=off"]
    flags = ["-fPIC", *build.CXX_FLAGS, *build.vector_width_flags(), macro, *contraction, f"-I{SHIM}", f"-I{CSRC}"]

    def compiled(source: Path) -> Path:
        target = output.with_suffix(f".{source.stem}.o")
        _gxx(*flags, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    # -Bsymbolic: the library's own allocation, although the process has another.
    _gxx(*flags, "-shared", "-Wl,-Bsymbolic", *objects, "-o", output)
    return LevelLibrary(output, emulated=bool(missing_flags(level)))


def _gxx(*arguments: str | Path) -> None:
    command = ["g++", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
