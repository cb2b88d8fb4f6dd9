"""What the build does when it is told to, told not to, or cannot: csrc/build_extension.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
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
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_extension", CSRC / "build_extension.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_architectures_can_be_chosen(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_DPPO_CUDA_ARCHS", "90a; 120+PTX")
    flags = [build._gencode(arch) for arch in build.cuda_archs()]
    assert flags == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_120,code=[sm_120,compute_120]"]


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
