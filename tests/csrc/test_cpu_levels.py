"""The CPU forward's sums on every level of x86-64 that this processor has: csrc/cpu/row_partials.cpp, one level at a time.

The extension holds a clone for each level and takes the best, so that its tests see one of them only. Narrower vectors
must not add more roundings.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.csrc.emulation_library import (
    FLOAT32,
    LogitsShard,
    MergeArguments,
    PartialsArguments,
    RowSelection,
    address,
)

CSRC = Path(__file__).parents[2] / "csrc"
SHIM = Path(__file__).with_name("cpu_levels")
CPUINFO = Path("/proc/cpuinfo")
LEVELS = {
    "x86-64": set(),
    "x86-64-v3": {"avx2", "fma", "bmi2", "f16c"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512vl"},
}

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine"),
    pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.exists(), reason="not x86-64 Linux"),
    pytest.mark.skipif(not CSRC.exists(), reason="csrc/ is not beside the tests"),
]


@pytest.fixture(scope="module", params=LEVELS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    level = request.param
    if missing := LEVELS[level] - set(CPUINFO.read_text().split()):
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    output = tmp_path_factory.mktemp("cpu_levels") / "library.so"
    sources = [CSRC / "cpu/row_partials.cpp", CSRC / "cpu/merge_partials.cpp", SHIM / "launchers.cpp"]
    flags = ["-O3", "-std=c++20", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
    paths = [f"-I{SHIM}", f"-I{CSRC}"]
    command = ["g++", *flags, f"-march={level}", "-DDPPO_ONE_CPU_LEVEL", *paths, *map(str, sources), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(output))


def partials_of(library: ctypes.CDLL, logits: np.ndarray, at: int) -> np.ndarray:
    """[5] max, rest, tilt, squares, target of one row [1, V]."""
    columns, target, out = logits.shape[1], np.array([at]), np.full((1, 5), np.nan, np.float32)
    shard = LogitsShard(address(logits), FLOAT32, columns, columns, 0, columns)
    arguments = PartialsArguments(shard, RowSelection(None, None, 1), address(target), None, 0, 1.0, address(out))
    library.row_partials(ctypes.byref(arguments))
    return out[0]


@pytest.mark.parametrize("gap", [10.0, 11.3, 20.0, 40.0])
@pytest.mark.parametrize("columns", [100, 3000, 49152, 151936])
def test_sums_of_equal_terms_are_off_by_no_more_than_their_17_roundings(
    library: ctypes.CDLL, gap: float, columns: int
) -> None:
    """kLanes in csrc/cpu/row_partials.cpp counts them. The term itself, and so what exp2 leaves, is measured."""

    def row(n: int) -> np.ndarray:
        logits = np.full((1, n), -gap, np.float32)
        logits[0, 0] = 0.0
        return partials_of(library, logits, 0)

    _, term, tilt, square, _ = row(2).astype(np.float64)
    _, rest, tilts, squares, _ = row(columns).astype(np.float64)
    for total, one in ((rest, term), (tilts, tilt), (squares, square)):
        # One more rounding each for a result in single precision.
        assert abs(total / ((columns - 1) * one) - 1) <= 19 * 2.0**-24


def test_rows_of_random_logits_are_right_to_the_last_digits(library: ctypes.CDLL) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (1, 49152)).astype(np.float32)
    partials = partials_of(library, logits, 7)[None, None]
    out = [np.full(1, np.nan, np.float32) for _ in range(6)]
    log_prob, entropy, collision, topk, maximum, log_sum = out
    library.merge_partials(
        ctypes.byref(
            MergeArguments(address(partials), 1, 1, 0, None, *map(address, (*out[:3], topk, maximum, log_sum)))
        )
    )
    z = logits[0].astype(np.float64)
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    assert maximum[0] == z.max()
    for got, want in ((log_prob, np.log(p[7])), (entropy, -(p * np.log(p)).sum()), (collision, (p * p).sum())):
        # Errors of independent terms average out: a few roundings of numbers up to 20.
        assert got[0] == pytest.approx(want, rel=2.0**-21, abs=2.0**-21)
