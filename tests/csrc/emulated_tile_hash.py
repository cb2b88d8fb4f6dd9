"""The emulated kernel that hashes pieces of weights, against the hash in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from emulation_library import hash_tiles
from tile_hash_reference import SHAPES, TILE_WORDS, Shape, expected_sums

# Of neighbouring parts of a parameter the last words and the first ones share a tile.
NEIGHBOURS = (Shape(2, 3, 400), Shape(2, 5, 80, gap=8, first_word=600), Shape(4, 1, 100, first_word=TILE_WORDS - 50))


def tile_hash_failures(emulated: Any, few: bool) -> Iterator[str]:
    """All shapes in one launch, each in tiles of its own, then parts that share one; ``few``: only these."""
    rounds = [(list(NEIGHBOURS), [0] * len(NEIGHBOURS))]
    if not few:
        tiles = [shape.num_tiles for shape in SHAPES.values()]
        rounds.append((list(SHAPES.values()), [sum(tiles[:i]) for i in range(len(tiles))]))
    for shapes, first_tiles in rounds:
        random = np.random.default_rng(3)
        sources = [shape.source(random) for shape in shapes]
        total = max(first + shape.num_tiles for first, shape in zip(first_tiles, shapes, strict=True))
        sums = np.full((2, total), 7, np.int32)
        expected = expected_sums(sums, shapes, sources, first_tiles)
        hash_tiles(emulated.library, emulated.tile_hash, shapes, sources, first_tiles, sums)
        wrong = [
            shape
            for shape, first in zip(shapes, first_tiles, strict=True)
            if (sums != expected)[:, first : first + shape.num_tiles].any()
        ]
        if wrong:
            yield f"the sums of tiles are wrong: {wrong}"
