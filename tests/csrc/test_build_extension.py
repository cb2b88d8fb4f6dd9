"""What the build does when it is told to, told not to, or cannot: csrc/build_extension.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.csrc.cpu_level_library import CSRC, load_build

pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="csrc/ is not beside the tests")

SETUP = """
import sys
sys.path.insert(0, {csrc!r})
from setuptools import setup
from build_extension import build_ext_command, extension_modules
setup(
    name="megatron_dppo",
    packages=[],
    ext_modules=extension_modules(),
    cmdclass={{"build_ext": build_ext_command()}},
    script_args=["build_ext", "--build-temp", {folder!r}, "--build-lib", {folder!r}],
)
"""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delenv("MEGATRON_DPPO_CPU_LEVEL", raising=False)
    return load_build()


def test_zero_builds_nothing(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_DPPO_BUILD_EXT", "0")
    assert build.extension_modules() == []


def test_cuda_kernels_that_are_demanded_need_a_toolkit(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_DPPO_CUDA", "1")
    monkeypatch.setattr(build, "find_cuda_home", lambda: None)
    with pytest.raises(RuntimeError, match="put nvcc on PATH or set CUDA_HOME"):
        build.extension_modules()


@pytest.mark.parametrize("variable", ["MEGATRON_DPPO_BUILD_EXT", "MEGATRON_DPPO_CUDA"])
def test_an_unknown_choice_is_refused(build: ModuleType, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "yes")
    with pytest.raises(RuntimeError, match=f"{variable} must be auto, 0 or 1"):
        build.extension_modules()


@pytest.mark.parametrize("level", ["avx2", "x86-64-v2", ""])
def test_an_unknown_level_is_refused(build: ModuleType, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv("MEGATRON_DPPO_CPU_LEVEL", level)
    with pytest.raises(RuntimeError, match=f"must be unset or one of x86-64, x86-64-v3, x86-64-v4, not '{level}'$"):
        build.extension_modules()


@pytest.mark.parametrize(
    ("machine", "level", "macros"),
    [
        ("x86_64", None, []),
        ("x86_64", "x86-64-v3", [("DPPO_CPU_LEVEL", '"x86-64-v3"')]),
        ("aarch64", None, []),
    ],
)
def test_one_level_is_compiled_where_it_is_asked_for(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    level: str | None,
    macros: list[tuple[str, str]],
) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    if level is not None:
        monkeypatch.setenv("MEGATRON_DPPO_CPU_LEVEL", level)
    assert build.cpu_level_macros() == macros
    extensions = build.extension_modules()
    assert [extension.name for extension in extensions] == ["megatron_dppo._C", "megatron_dppo._tile_hash"]
    for extension in extensions:
        assert [macro for macro in extension.define_macros if "CPU" in macro[0]] == macros
        assert ("-mprefer-vector-width=512" in extension.extra_compile_args) == (machine == "x86_64")


def test_a_level_of_another_processor_is_refused(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    monkeypatch.setenv("MEGATRON_DPPO_CPU_LEVEL", "x86-64-v3")
    with pytest.raises(RuntimeError, match="MEGATRON_DPPO_CPU_LEVEL=x86-64-v3 is for x86-64, not aarch64: unset it"):
        build.cpu_level_macros()


def test_architectures_can_be_chosen(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_DPPO_CUDA_ARCHS", "90a; 120+PTX")
    flags = [build._gencode(arch) for arch in build.cuda_archs()]
    assert flags == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_120,code=[sm_120,compute_120]"]


@pytest.mark.parametrize(
    ("version", "cuda", "kernels", "c10_cuda"),
    [("2.11.0", None, True, False), ("2.10.0+cu128", "12.8", True, True), ("2.6.0", None, False, False)],
)
def test_an_older_torch_gives_its_stream_by_its_cuda_library(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: str,
    cuda: str | None,
    kernels: bool,
    c10_cuda: bool,
) -> None:
    """Of the CPU build of one there is no such library, nor ever a tensor on a GPU."""
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(build, "find_cuda_home", lambda: tmp_path)
    extension = build.extension_modules()[0]
    macros = dict(extension.define_macros)
    assert ("DPPO_WITH_CUDA" in macros) == kernels
    assert ("DPPO_STREAM_OF_C10_CUDA" in macros) == ("c10_cuda" in extension.libraries) == c10_cuda
    monkeypatch.setenv("MEGATRON_DPPO_CUDA", "1")
    if not kernels:
        with pytest.raises(RuntimeError, match=r"torch 2.6.0 is a CPU build and older than 2.11"):
            build.extension_modules()


@pytest.mark.slow
@pytest.mark.parametrize(("wanted", "fails"), [("auto", False), ("1", True)])
def test_without_a_compiler_the_build_goes_on_unless_the_extension_is_demanded(
    wanted: str, fails: bool, tmp_path: Path
) -> None:
    environment = {**os.environ, "CXX": "/bin/false", "MEGATRON_DPPO_CUDA": "0", "MEGATRON_DPPO_BUILD_EXT": wanted}
    script = SETUP.format(csrc=str(CSRC), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=CSRC.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stderr
    assert ("built without its native kernels" in done.stderr) != fails
