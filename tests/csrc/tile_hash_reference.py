"""The hash of the servers' parameters in unsigned numpy, word for word as SGLang's kernel has it; and pieces to try it on.

For the CPU and the emulated CUDA kernel; megatron_dppo/rollout/sglang/tile_hash_reference.py does the same in int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TILE_WORDS = 8192
SEED = 0x243F6A88
SEEDS = (SEED, ((SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
FACTORS = (0x27D4EB2D, 0x165667B1)
ROTATIONS = (15, 13)
DTYPES = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Shape:
    """A piece: ``present`` rows and columns in memory of ``rows`` x ``columns`` in the parameter.

    ``gap`` elements lie between rows in memory, ``offset`` before the first one, behind a 16-byte boundary.
    """

    element_bytes: int
    rows: int
    columns: int
    present: tuple[int, int] | None = None
    gap: int = 0
    offset: int = 0
    first_word: int = 0

    @property
    def num_words(self) -> int:
        return self.rows * self.columns * self.element_bytes // 4

    @property
    def num_tiles(self) -> int:
        last = (self.first_word + self.num_words - 1) // TILE_WORDS
        return last - self.first_word // TILE_WORDS + 1 if self.num_words else 0

    def source(self, random: np.random.Generator) -> np.ndarray:
        """Random elements, whose end is the end of the allocation."""
        rows, columns = self.present or (self.rows, self.columns)
        stride = columns + self.gap
        flat = np.empty(self.offset + max(rows - 1, 0) * stride + columns, DTYPES[self.element_bytes])
        strides = (stride * self.element_bytes, self.element_bytes)
        matrix = np.lib.stride_tricks.as_strided(flat[self.offset :], (rows, columns), strides)
        matrix[:] = random.integers(0, 2 ** (8 * self.element_bytes), (rows, columns), matrix.dtype)
        return matrix


# What each axis can break: the bytes that rows, gaps and the beginning have in common decide what is read at a time
# (16, 4 or 2); rows may be longer or shorter than a tile, and words may straddle two of them; zeros may be columns, rows,
# or all there is; positions are taken modulo 2^32.
SHAPES = {
    "two tiles of vectors": Shape(2, 1, 2 * TILE_WORDS + 1000),
    "whole rows, one after the other": Shape(4, 30, 300),
    "rows apart": Shape(2, 40, 480, gap=32),
    "rows longer than a tile, apart": Shape(4, 2, 9000, gap=12),
    "padded rows and columns": Shape(2, 32, 512, present=(20, 480), gap=16),
    "a row of columns, then zeros": Shape(4, 5, 2000, present=(1, 1996)),
    "more rows than there are": Shape(2, 64, 320, present=(40, 320)),
    "zeros alone": Shape(2, 3, 40, present=(0, 40)),
    "words that vectors do not fit": Shape(4, 11, 37, gap=3),
    "rows that begin amid a vector": Shape(4, 8, 1200, offset=1),
    "a parameter's part that does": Shape(2, 6, 800, first_word=TILE_WORDS - 3),
    "odd rows": Shape(2, 12, 801, gap=1),
    "odd rows, padded": Shape(2, 6, 801, present=(5, 799)),
    "rows of one element": Shape(2, 30, 1, gap=2),
    "halves that begin amid a word": Shape(2, 4, 64, offset=1),
    "present columns that end amid a word": Shape(2, 8, 64, present=(8, 33)),
    "eight bytes each": Shape(8, 5, 33, present=(4, 32), gap=1),
    "beyond 2^32 words": Shape(4, 7, 1500, first_word=2**32 - 5000),
    "long beyond 2^32 words": Shape(2, 3, 130, gap=2, first_word=5 * 2**33 + 12),
    "nothing": Shape(2, 0, 64),
}


def expected_sums(
    sums: np.ndarray, shapes: Sequence[Shape], sources: Sequence[np.ndarray], first_tiles: Sequence[int]
) -> np.ndarray:
    """``sums`` [2, tiles], to which those of all pieces are added."""
    sums = sums.view(np.uint32).copy()
    for shape, source, first_tile in zip(shapes, sources, first_tiles, strict=True):
        whole = np.zeros((shape.rows, shape.columns), source.dtype)
        whole[: source.shape[0], : source.shape[1]] = source
        words = whole.reshape(-1).view(np.uint32)
        places = shape.first_word + np.arange(len(words), dtype=np.uint64)
        tiles = (places // TILE_WORDS - shape.first_word // TILE_WORDS).astype(np.int64) + first_tile
        position = places.astype(np.uint32)
        for row in range(2):
            rotated = position << np.uint32(ROTATIONS[row]) | position >> np.uint32(32 - ROTATIONS[row])
            mixed = (position * np.uint32(FACTORS[row]) + np.uint32(SEEDS[row])) ^ rotated
            np.add.at(sums[row], tiles, fmix32(words ^ mixed))
    return sums.view(np.int32)


def fmix32(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
