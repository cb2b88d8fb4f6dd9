"""The CPU kernels stay inside the memory that they are given: AddressSanitizer and UndefinedBehaviourSanitizer find nothing.

The driver is that of the emulated CUDA kernels, with its odd shapes, masks and lists of rows, on the code that every other
processor gets (no clones): a clone for wider vectors is the same source.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.csrc.cpu_level_library import CSRC, SHIM, load_build
from tests.csrc.sanitized_driver import asan_environment, run_driver

LAUNCHERS = Path(__file__).with_name("cpu_sanitized") / "launchers.cpp"
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine"),
    pytest.mark.skipif(not CSRC.exists(), reason="csrc/ is not beside the tests"),
]


def compile_sanitized(csrc: Path, output: Path) -> Path:
    """All CPU kernels in one library."""
    build = load_build()
    flags = ["-fPIC", *build.CXX_FLAGS, "-g0", *SANITIZERS, "-DDPPO_NO_CPU_CLONES", f"-I{SHIM}", f"-I{csrc}"]

    def compiled(source: Path) -> Path:
        target = output.with_suffix(f".{source.stem}.o")
        gxx(*flags, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*sorted((csrc / "cpu").glob("*.cpp")), LAUNCHERS]))
    gxx(*flags, "-shared", *objects, "-o", output)
    return output


def gxx(*arguments: str | Path) -> None:
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_found(tmp_path: Path) -> None:
    fine, answer = run_driver(compile_sanitized(CSRC, tmp_path / "kernels.so"), **asan_environment())
    assert fine, answer


@pytest.mark.parametrize(
    ("file", "text", "replacement"),
    [
        ("cpu/row_partials.cpp", "unpack(row, n < kChunk ? n : kChunk", "unpack(row, n < kChunk ? n + 1 : kChunk"),
        ("cpu/logits_row.h", "valid_end - begin, row", "valid_end - begin + 1, row"),
        ("cpu/fp32_product.cpp", "packed_a(as_it_is ? 0 : kRows", "packed_a(as_it_is ? 0 : 63"),
    ],
    ids=["a column more is read", "a column more is written", "a row is packed beyond the end"],
)
def test_a_seeded_overrun_is_found(file: str, text: str, replacement: str, tmp_path: Path) -> None:
    shutil.copytree(CSRC, tmp_path / "csrc")
    source = tmp_path / "csrc" / file
    correct = source.read_text(encoding="utf-8")
    assert text in correct
    source.write_text(correct.replace(text, replacement), encoding="utf-8")
    fine, answer = run_driver(compile_sanitized(tmp_path / "csrc", tmp_path / "kernels.so"), **asan_environment())
    assert not fine
    assert "AddressSanitizer" in answer
