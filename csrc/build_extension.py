"""How ``megatron_dppo._C`` is built, and the library for servers beside it; setup.py imports this file by its path.

``_C`` has CPU kernels always and CUDA kernels where nvcc is found. Without a compiler or torch, megatron_dppo still
installs and computes in plain torch. nvcc is called directly on the torch-free .cu files (seconds, where torch's headers
take minutes), so the CUDA kernels also build against a CPU build of torch.

Environment:
    MEGATRON_DPPO_BUILD_EXT   auto (default): build; on failure say so and go on without.  1: failure is an error.  0: skip.
    MEGATRON_DPPO_CUDA        auto (default): CUDA kernels if nvcc is found.  1: nvcc must be there.  0: CPU kernels only.
    MEGATRON_DPPO_CUDA_ARCHS  default "80;90a;100+PTX"
    MEGATRON_DPPO_CPU_LEVEL   x86-64, x86-64-v3 (AVX2) or x86-64-v4 (AVX-512): CPU kernels of this level only, to test it.
                              Unset: of all three, and the processor's best is taken.
    CUDA_HOME                 the toolkit, if it is neither on PATH nor in /usr/local/cuda
    CXX, CFLAGS, MAX_JOBS     as usual
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parent
NAME = "megatron_dppo._C"
SERVER_NAME = "megatron_dppo._tile_hash"  # no module: servers on a CPU load it through ctypes (csrc/server)
DEFAULT_ARCHS = "80;90a;100+PTX"
CPU_LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4")  # csrc/cpu/vector_math.h
# errno and trapping keep loops from being vectorised; NaN, infinity and signed zero keep their meaning (no -ffast-math).
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
# Subnormal results round to 0: one instruction per exponential instead of four. tools/check/check_cuda.sh too.
NVCC_FLAGS = ["-std=c++17", "-O3", "-ftz=true", "-lineinfo"]


def extension_modules() -> list[Any]:
    """The extension and the servers' library, or nothing where none is wanted or torch is not there to build against."""
    if _choice("MEGATRON_DPPO_BUILD_EXT") == "0":
        return []
    try:
        import torch
        from setuptools import Extension
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        _give_up(error)
        return []
    cuda_home = _cuda_home_if_wanted()
    flags = [*CXX_FLAGS, *vector_width_flags()]
    macros = [("DPPO_BUILD_FLAGS", f'"{" ".join(flags)}"'), ("DPPO_TORCH_VERSION", f'"{torch.__version__}"')]
    macros += cpu_level_macros()
    settings: dict[str, Any] = {
        "include_dirs": [str(CSRC)],
        "extra_link_args": ["-fopenmp", *_torch_openmp()],
    }
    if cuda_home is not None:
        macros += [("DPPO_WITH_CUDA", "1"), ("DPPO_CUDA_ARCHS", f'"{";".join(cuda_archs())}"')]
        settings["include_dirs"].append(str(cuda_home / "include"))
        settings["library_dirs"] = [str(cuda_home / "lib64")]
        settings["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
        if _needs_c10_cuda():
            macros.append(("DPPO_STREAM_OF_C10_CUDA", "1"))
            settings["libraries"].append("c10_cuda")
    sources = [
        CSRC / "module.cpp",
        *(path for folder in ("operators", "cpu") for path in sorted((CSRC / folder).glob("*.cpp"))),
    ]
    relative = [os.path.relpath(source, CSRC.parent) for source in sources]
    # The servers' process has its own OpenMP runtime, and no need of ours.
    server_flags = [flag for flag in flags if flag != "-fopenmp"]
    server_source = os.path.relpath(CSRC / "server/tile_hash.cpp", CSRC.parent)
    return [
        CppExtension(NAME, relative, define_macros=macros, extra_compile_args=flags, **settings),
        Extension(SERVER_NAME, [server_source], define_macros=cpu_level_macros(), extra_compile_args=server_flags),
    ]


def vector_width_flags() -> list[str]:
    """x86-64 compilers prefer 256-bit vectors even where 512-bit ones are faster; other machines know no such flag."""
    return ["-mprefer-vector-width=512"] if _is_x86_64() else []


def cpu_level_macros() -> list[tuple[str, str]]:
    """What restricts the CPU kernels to one level of x86-64, where MEGATRON_DPPO_CPU_LEVEL asks for one."""
    level = os.environ.get("MEGATRON_DPPO_CPU_LEVEL")
    if level is None:
        return []
    if level not in CPU_LEVELS:
        raise RuntimeError(f"MEGATRON_DPPO_CPU_LEVEL must be unset or one of {', '.join(CPU_LEVELS)}, not {level!r}")
    if not _is_x86_64():
        raise RuntimeError(f"MEGATRON_DPPO_CPU_LEVEL={level} is for x86-64, not {platform.machine()}: unset it")
    return [("DPPO_CPU_LEVEL", f'"{level}"')]


def build_ext_command() -> Any:
    """The build_ext command class: nvcc first, then torch's own build of the C++ sources; None where torch is missing."""
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        return None

    class BuildNativeExtension(BuildExtension):
        def build_extensions(self) -> None:
            cuda_home = _cuda_home_if_wanted()
            if cuda_home is not None:
                self.extensions[0].extra_objects += compile_cuda(cuda_home, Path(self.build_temp).resolve())
            super().build_extensions()

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                _give_up(error)
                self.extensions: list[Any] = []

    return BuildNativeExtension


def cuda_archs() -> list[str]:
    """Architectures to compile for, such as ``90a`` or ``100+PTX``."""
    archs = os.environ.get("MEGATRON_DPPO_CUDA_ARCHS", DEFAULT_ARCHS).split(";")
    return [arch.strip() for arch in archs if arch.strip()]


def find_cuda_home() -> Path | None:
    """The folder that holds bin/nvcc and include/cuda_runtime.h. nvcc on PATH may be a script that lies elsewhere."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for candidate in candidates:
        if candidate and (Path(candidate) / "bin/nvcc").exists() and _has_headers(Path(candidate)):
            return Path(candidate)
    return None


def compile_cuda(cuda_home: Path, folder: Path) -> list[str]:
    """Compile every .cu of csrc/cuda for all architectures; return the object files."""
    folder.mkdir(parents=True, exist_ok=True)
    commands = {}
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        target = str(folder / f"{source.stem}.cuda.o")
        flags = [*NVCC_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", *(_gencode(arch) for arch in cuda_archs())]
        commands[target] = [str(cuda_home / "bin/nvcc"), *flags, "-c", str(source), "-o", target]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        for _ in pool.map(_run, commands.values()):
            pass
    return list(commands)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")


def _gencode(arch: str) -> str:
    number = arch.removesuffix("+PTX")
    code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def _has_headers(cuda_home: Path) -> bool:
    return (cuda_home / "include/cuda_runtime.h").exists()


def _cuda_home_if_wanted() -> Path | None:
    """The toolkit to build CUDA kernels with; None to build without."""
    import torch

    wanted = _choice("MEGATRON_DPPO_CUDA")
    cuda_home = None if wanted == "0" else find_cuda_home()
    if wanted == "1" and cuda_home is None:
        raise RuntimeError("MEGATRON_DPPO_CUDA=1, but there is no CUDA toolkit: put nvcc on PATH or set CUDA_HOME")
    if cuda_home is not None and _needs_c10_cuda() and torch.version.cuda is None:
        if wanted == "1":
            raise RuntimeError(
                f"MEGATRON_DPPO_CUDA=1, but torch {torch.__version__} is a CPU build and older than 2.11"
            )
        return None  # no tensor of this torch is ever on a GPU
    return cuda_home


def _needs_c10_cuda() -> bool:
    """Whether torch is older than c10::Stream::native_handle(), which came with 2.11."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) < (2, 11)


def _choice(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        raise RuntimeError(f"{variable} must be auto, 0 or 1, not {value!r}")
    return value


def _is_x86_64() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def _torch_openmp() -> list[str]:
    """The OpenMP runtime that torch carries: with a second one, torch.set_num_threads would not reach these kernels."""
    import torch

    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))]


def _give_up(error: Exception) -> None:
    if _choice("MEGATRON_DPPO_BUILD_EXT") == "1":
        raise error
    reason = f"{type(error).__name__}: {error}"
    print(f"megatron_dppo: built without its native kernels, to compute in plain torch ({reason})", file=sys.stderr)
