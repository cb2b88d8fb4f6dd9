"""The CPU kernels on every level of x86-64, and compiled as for other processors.

The extension holds a clone for each level and takes the best that the processor has, so that its own tests see one of
them. Here each is compiled by itself, with the extension's flags; levels that this processor lacks run on an emulated one.
Wider vectors must neither add in another order nor add roundings.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import numpy as np
import pytest

from tests.csrc.cpu_level_library import CSRC, IS_X86_64, LEVELS, LevelLibrary, compile_level, missing_flags, why_not
from tests.csrc.emulation_library import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    TILE_COLUMNS,
    BackwardArguments,
    DivergenceArguments,
    LogitsShard,
    MergeArguments,
    MergeNodesArguments,
    PartialsArguments,
    RowSelection,
    TileNodesArguments,
    address,
    count_nodes,
    decode,
    encode,
    hash_tiles,
)
from tests.csrc.tile_hash_reference import SHAPES, expected_sums

ROUNDING = 2.0**-24  # of a float, to nearest
DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine"),
    pytest.mark.skipif(not CSRC.exists(), reason="csrc/ is not beside the tests"),
]
Compiled = Callable[..., LevelLibrary]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The library of a level, compiled once; skips where nothing can run it."""
    libraries: dict[tuple[str | None, bool], LevelLibrary] = {}

    def of_level(level: str | None, fused_multiply_add: bool = True) -> LevelLibrary:
        if reason := why_not(level):
            pytest.skip(reason)
        key = (level, fused_multiply_add)
        if key not in libraries:
            output = tmp_path_factory.mktemp("cpu_level") / "library.so"
            libraries[key] = compile_level(level, output, fused_multiply_add=fused_multiply_add)
        return libraries[key]

    return of_level


@pytest.fixture(params=LEVELS, ids=lambda level: level or "compiler's own target")
def library(request: pytest.FixtureRequest, compiled: Compiled) -> LevelLibrary:
    return compiled(request.param)


def shard(logits: np.ndarray, dtype: int = FLOAT32) -> LogitsShard:
    columns = logits.shape[1]
    return LogitsShard(address(logits), dtype, columns, columns, 0, columns)


def partials_of(library: LevelLibrary, logits: np.ndarray, target: np.ndarray, dtype: int = FLOAT32) -> np.ndarray:
    """[n, 5] max, rest, tilt, squares, target."""
    n = len(logits)
    out = np.full((n, 5), np.nan, np.float32)
    selection = RowSelection(None, None, n)
    arguments = (shard(logits, dtype), selection, address(target), None, 0, 1.0, address(out))
    library("row_partials", PartialsArguments(*arguments))
    return out


class Problem:
    """Rows of logits of two policies and what the kernels are told about them, from float64."""

    def __init__(self, columns: int, dtype: int) -> None:
        rng = np.random.default_rng(columns)
        self.dtype, self.columns = dtype, columns
        self.pi, self.mu = (encode(rng.normal(0, 4, (3, columns)), dtype) for _ in range(2))
        self.target = rng.integers(0, columns, 3)
        self.coefficients = rng.normal(0, 1, (2, 3)).astype(np.float32)
        self.z, self.z_mu = decode(self.pi, dtype), decode(self.mu, dtype)
        self.log_p, self.log_mu = (z - z.max(1, keepdims=True) - _log_sum(z)[:, None] for z in (self.z, self.z_mu))
        self.entropy = -(np.exp(self.log_p) * self.log_p).sum(1)

    def partials(self, library: LevelLibrary) -> np.ndarray:
        return partials_of(library, self.pi, self.target, self.dtype)

    def nodes(self, library: LevelLibrary, shards: int = 1) -> list[np.ndarray]:
        """Log-prob, entropy, collision, maximum and log-sum by the nodes of the tile tree."""
        tiles = -(-self.columns // (TILE_COLUMNS * shards))
        nodes = max(count_nodes(r * tiles, (r + 1) * tiles) for r in range(shards))
        partials = np.full((shards, 3, 4 * nodes + 1), np.nan, np.float32)
        for r in range(shards):
            width = self.columns if shards == 1 else tiles * TILE_COLUMNS
            part = np.ascontiguousarray(self.pi[:, r * width : (r + 1) * width])
            place = LogitsShard(address(part), self.dtype, width, part.shape[1], r * width, part.shape[1])
            row = (place, RowSelection(None, None, 3), address(self.target), None, 0, 1.0, address(partials[r]))
            library("tile_nodes", TileNodesArguments(PartialsArguments(*row), tiles, nodes))
        out = [np.full(3, np.nan, np.float32) for _ in range(6)]
        merge = MergeArguments(address(partials), shards, 3, 0, None, *map(address, out))
        library("merge_tile_nodes", MergeNodesArguments(merge, tiles, nodes, 1.0, None))
        return [*out[:3], *out[4:]]

    def gradient(self, library: LevelLibrary) -> np.ndarray:
        grad = np.zeros_like(self.pi)
        per_row = [
            values.astype(np.float32)
            for values in (self.z.max(1), _log_sum(self.z), self.log_p[np.arange(3), self.target], self.entropy)
        ]
        per_row += [self.coefficients[0].copy(), self.coefficients[1].copy()]
        places = map(address, (self.target, *per_row))
        arguments = (shard(self.pi, self.dtype), 3, None, *places, 1.0, address(grad), self.columns)
        library("policy_backward", BackwardArguments(*arguments))
        return grad

    def divergence(self, library: LevelLibrary, distance: int) -> np.ndarray:
        sums = np.full(3, np.nan, np.float32)
        per_row = [values.astype(np.float32) for z in (self.z, self.z_mu) for values in (z.max(1), _log_sum(z))]
        policies = shard(self.pi, self.dtype), shard(self.mu, self.dtype)
        known = (None, None, None, 0)
        arguments = (*policies, RowSelection(None, None, 3), *map(address, per_row), *known, 1.0, distance)
        library("shard_divergence", DivergenceArguments(*arguments, address(sums)))
        return sums

    def results(self, library: LevelLibrary) -> dict[str, bytes]:
        """Every kernel's numbers, bit by bit."""
        return {
            "partials": self.partials(library).tobytes(),
            "nodes": b"".join(values.tobytes() for values in self.nodes(library)),
            "gradient": self.gradient(library).tobytes(),
            "TV": self.divergence(library, 0).tobytes(),
            "KL": self.divergence(library, 1).tobytes(),
        }


def _log_sum(z: np.ndarray) -> np.ndarray:
    return np.log(np.exp(z - z.max(1, keepdims=True)).sum(1))


@pytest.mark.parametrize("gap", [10.0, 11.3, 20.0, 40.0])
@pytest.mark.parametrize("columns", [100, 2047, 3000, 49152, 151936])
def test_sums_of_equal_terms_are_off_by_no_more_than_their_24_roundings(
    library: LevelLibrary, gap: float, columns: int
) -> None:
    """csrc/cpu/row_partials.cpp counts them. The term itself, and so what exp2 leaves, is measured."""

    def row(n: int) -> np.ndarray:
        logits = np.full((1, n), -gap, np.float32)
        logits[0, 0] = 0.0
        return partials_of(library, logits, np.array([0]))[0]

    _, term, tilt, square, _ = row(2).astype(np.float64)
    _, rest, tilts, squares, _ = row(columns).astype(np.float64)
    for total, one in ((rest, term), (tilts, tilt), (squares, square)):
        # One more rounding each for a result in single precision.
        assert abs(total / ((columns - 1) * one) - 1) <= 26 * ROUNDING


def test_rows_of_random_logits_are_right_to_the_last_digits(library: LevelLibrary) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (1, 49152)).astype(np.float32)
    partials = partials_of(library, logits, np.array([7]))[None]
    out = [np.full(1, np.nan, np.float32) for _ in range(6)]
    log_prob, entropy, collision, topk, maximum, log_sum = out
    places = map(address, (*out[:3], topk, maximum, log_sum))
    library("merge_partials", MergeArguments(address(partials), 1, 1, 0, None, *places))
    z = logits[0].astype(np.float64)
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    assert maximum[0] == z.max()
    for got, want in ((log_prob, np.log(p[7])), (entropy, -(p * np.log(p)).sum()), (collision, (p * p).sum())):
        # Errors of independent terms average out: a few roundings of numbers up to 20.
        assert got[0] == pytest.approx(want, rel=2.0**-21, abs=2.0**-21)


@pytest.mark.parametrize("columns", [33, 5000])
def test_gradients_are_right_to_the_last_digits(library: LevelLibrary, columns: int) -> None:
    """An element is g p (slope y + constant) with y = log2 p.

    y is a difference of numbers below M = max |y| + log2 of the sum, each off by at most 3 roundings of itself (of x - max,
    of log2(e), of the product), which scales p by 1 + 6 M ln(2) roundings; exp2 adds 2e-7, or 4 roundings. The second
    factor is a sum of numbers below 2 |g| (|y| + entropy + 1), with the same errors relative to them.
    """
    problem = Problem(columns, FLOAT32)
    p, (g1, g2) = np.exp(problem.log_p), problem.coefficients.astype(np.float64)[:, :, None]
    at_target = np.arange(columns)[None] == problem.target[:, None]
    exact = g1 * (at_target - p) - g2 * p * (problem.log_p + problem.entropy[:, None])
    largest = (np.abs(problem.log_p).max() + _log_sum(problem.z).max()) / np.log(2)
    size = p * (np.abs(g1) + np.abs(g2) * (np.abs(problem.log_p) + problem.entropy[:, None]))
    # At the target the kernel writes g (1 - p) by itself: its rounding is relative to the result.
    tolerance = ROUNDING * ((6 * largest + 10) * size + 4 * np.abs(exact))
    assert (np.abs(problem.gradient(library) - exact) <= tolerance).all()


@pytest.mark.parametrize("columns", [33, 5000, 49152])
@pytest.mark.parametrize("distance", ["TV", "KL"])
def test_divergences_are_right_to_the_last_digits(library: LevelLibrary, columns: int, distance: str) -> None:
    """As for the gradient's p and y; and 21 roundings of the sum (csrc/cpu/lane_sums.h, sum_terms of 1024) and its result."""
    problem = Problem(columns, FLOAT32)
    got = problem.divergence(library, ["TV", "KL"].index(distance))
    p, mu, difference = np.exp(problem.log_p), np.exp(problem.log_mu), problem.log_mu - problem.log_p
    exact, size = {
        "TV": (0.5 * np.abs(mu - p).sum(1), 0.5 * (mu + p).sum(1)),
        "KL": ((mu * difference).sum(1), (mu * (1 + np.abs(difference))).sum(1)),
    }[distance]
    largest = max(np.abs(problem.log_p).max(), np.abs(problem.log_mu).max())
    largest = (largest + max(_log_sum(problem.z).max(), _log_sum(problem.z_mu).max())) / np.log(2)
    assert (np.abs(got - exact) <= ROUNDING * (6 * largest + 4 + 21) * size).all()


@pytest.mark.parametrize("columns", [100, 5000, 49152])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_of_tiles_give_the_bits_of_the_whole(library: LevelLibrary, dtype: str, columns: int) -> None:
    problem = Problem(columns, DTYPES[dtype])
    whole = problem.nodes(library)
    for shards in (2, 3, 4):
        assert [values.tobytes() for values in problem.nodes(library, shards)] == [v.tobytes() for v in whole]
    entropy, log_sum = whole[1], whole[4]
    # Errors of independent terms average out: a few roundings of numbers up to 20, and of their sum.
    assert entropy == pytest.approx(problem.entropy, rel=2.0**-21, abs=2.0**-21)
    assert log_sum == pytest.approx(_log_sum(problem.z), rel=2.0**-21, abs=2.0**-21)


def test_sums_of_hashed_tiles_are_exact(library: LevelLibrary) -> None:
    shapes = list(SHAPES.values())
    rng = np.random.default_rng(0)
    sources = [shape.source(rng) for shape in shapes]
    first_tiles = [i % 3 for i in range(len(shapes))]  # several share a tile
    sums = np.zeros((2, 5), np.int32)
    expected = expected_sums(sums, shapes, sources, first_tiles)
    hash_tiles(library.library, lambda arguments: library("tile_hash", arguments), shapes, sources, first_tiles, sums)
    assert (sums == expected).all()


@pytest.mark.skipif(not IS_X86_64, reason="one level only")
@pytest.mark.parametrize("columns", [31, 1000, 5003])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        # Without fused multiply-add, which leaves out roundings, and which the narrowest level does not have.
        (("x86-64", False), ("x86-64-v3", False)),
        (("x86-64-v3", True), ("x86-64-v4", True)),
        ((None, True), ("x86-64", True)),
    ],
    ids=["128 and 256 bits", "256 and 512 bits", "without and with a level's name"],
)
def test_the_width_of_vectors_changes_no_bit(
    compiled: Compiled, narrow: tuple[str | None, bool], wide: tuple[str | None, bool], dtype: str, columns: int
) -> None:
    problem = Problem(columns, DTYPES[dtype])
    results = [problem.results(compiled(*level)) for level in (narrow, wide)]
    assert results[0] == results[1]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump on this machine")
@pytest.mark.skipif(not IS_X86_64, reason="one level only")
@pytest.mark.parametrize(("level", "widest"), [("x86-64", "xmm"), ("x86-64-v3", "ymm"), ("x86-64-v4", "zmm")])
def test_each_level_uses_its_widest_vectors(compiled: Compiled, level: str, widest: str) -> None:
    """Else the tests above would compare the same code with itself."""
    command = ["objdump", "-d", str(compiled(level).path)]
    code = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert max(("xmm", "ymm", "zmm"), key=lambda register: (f"%{register}" in code, register)) == widest


@pytest.mark.skipif(not IS_X86_64, reason="the emulated processor is of x86-64")
def test_the_emulated_processor_gives_what_the_real_one_does(compiled: Compiled) -> None:
    pytest.importorskip("bochscpu", reason="bochscpu is not installed (pip install bochscpu-python==0.3.1)")
    library, problem = compiled("x86-64" if missing_flags("x86-64-v3") else "x86-64-v3"), Problem(1000, BFLOAT16)
    assert problem.results(LevelLibrary(library.path, emulated=True)) == problem.results(library)
