"""The operator that hashes pieces of weights, against the hash in unsigned numpy and against its definition in torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from megatron_dppo.rollout.sglang import tile_hash_reference as definition
from tests.csrc.tile_hash_reference import SHAPES, Shape, expected_sums

pytest.importorskip("megatron_dppo.ops.native_backend", reason="the extension megatron_dppo._C is not built")
operators = torch.ops.megatron_dppo

TORCH_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Pieces:
    """Pieces with random contents, and what the operator is told of them; ``together``: all in the same tiles."""

    def __init__(self, shapes: Sequence[Shape], together: bool = False) -> None:
        random = np.random.default_rng(0)
        self.shapes = shapes
        self.sources = [shape.source(random) for shape in shapes]
        tiles = [shape.num_tiles for shape in shapes]
        self.first_tiles = [0 if together else sum(tiles[:i]) + 1 for i in range(len(shapes))]
        total = max(tiles) if together else sum(tiles) + 2
        self.before = random.integers(-(2**31), 2**31, (2, total)).astype(np.int32)

    def arguments(self) -> tuple[torch.Tensor, list[torch.Tensor], list[int], list[int], list[int], list[int]]:
        sources = [torch.from_numpy(source.view(np.dtype(f"i{source.itemsize}"))) for source in self.sources]
        sizes = [shape.rows for shape in self.shapes], [shape.columns for shape in self.shapes]
        first_words = [shape.first_word for shape in self.shapes]
        return torch.from_numpy(self.before.copy()), sources, *sizes, first_words, self.first_tiles

    def sums(self, tile_hash: object) -> np.ndarray:
        sums, *others = self.arguments()
        tile_hash(sums, *others)
        return sums.numpy()

    def expected(self) -> np.ndarray:
        return expected_sums(self.before, self.shapes, self.sources, self.first_tiles)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_and_the_definition_in_torch_are_the_hash(shape: str) -> None:
    pieces = Pieces([SHAPES[shape]])
    expected = pieces.expected()
    assert (pieces.sums(operators.tile_hash) == expected).all()
    assert (pieces.sums(definition.tile_hash) == expected).all()


@pytest.mark.parametrize("together", [False, True], ids=["each has its tiles", "all are added up"])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_call_takes_many_pieces(threads: int, together: bool) -> None:
    pieces = Pieces(list(SHAPES.values()), together)
    torch.set_num_threads(threads)
    assert (pieces.sums(operators.tile_hash) == pieces.expected()).all()


def test_no_pieces_leave_the_sums_as_they_are() -> None:
    sums = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    operators.tile_hash(sums, [], [], [], [], [])
    assert torch.equal(sums, torch.arange(6, dtype=torch.int32).reshape(2, 3))


@pytest.mark.parametrize("number", range(7))
def test_every_bit_counts(number: int) -> None:
    """A flipped bit changes both sums of its tile, and no other."""
    pieces = Pieces([Shape(2, 40, 961, gap=1)])
    before = pieces.sums(operators.tile_hash)
    row, column = divmod(number * 38440 // 7, 961)
    pieces.sources[0][row, column] ^= 1 << (2 * number)
    changed = pieces.sums(operators.tile_hash) != before
    tile = 1 + (row * 961 + column) // 2 // 8192
    assert changed[:, tile].all()
    assert changed.sum() == 2


WHOLE = torch.zeros(4, 6, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sums": torch.zeros(3, 8, dtype=torch.int32)}, r"sums must have shape \[2, 8\]"),
        ({"sums": torch.zeros(16, dtype=torch.int32)}, r"sums must have shape \[2, tiles\]"),
        ({"sums": torch.zeros(2, 8)}, "sums must be Int"),
        ({"sums": torch.zeros(8, 2, dtype=torch.int32).t()}, "sums must be contiguous"),
        ({"rows": [4]}, "must have 2 values, one for each source, not 1"),
        ({"sources": [WHOLE, WHOLE.t()]}, "piece 1 must be a matrix with contiguous columns"),
        ({"sources": [WHOLE, WHOLE[0]]}, "piece 1 must be a matrix with contiguous columns"),
        ({"sources": [WHOLE, WHOLE.to(torch.int8)]}, "piece 1 must have elements of 2, 4 or 8 bytes"),
        ({"rows": [4, 3]}, r"piece 1 of shape \[4, 6\] is larger than the 3 x 6"),
        ({"columns": [6, 5]}, r"piece 1 of shape \[4, 6\] is larger than the 4 x 5"),
        ({"columns": [6, 2**60]}, "piece 1 has 4 x 1152921504606846976 elements, which is too many"),
        ({"rows": [4, 5], "columns": [6, 7]}, "piece 1 has 5 x 7 elements of 2 bytes, which are not whole words"),
        ({"first_words": [0, -1]}, "piece 1 begins at word -1"),
        ({"first_tiles": [0, -1]}, "piece 1 has 1 tiles, from number -1 on; sums have 8"),
        ({"first_tiles": [0, 8]}, "piece 1 has 1 tiles, from number 8 on; sums have 8"),
        ({"first_words": [0, 8191], "first_tiles": [0, 7]}, "piece 1 has 2 tiles, from number 7 on; sums have 8"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "sums": torch.zeros(2, 8, dtype=torch.int32),
        "sources": [WHOLE, WHOLE],
        "rows": [4, 4],
        "columns": [6, 6],
        "first_words": [0, 0],
        "first_tiles": [0, 7],
    }
    operators.tile_hash(**arguments)
    with pytest.raises(ValueError, match=message):
        operators.tile_hash(**{**arguments, **change})


def test_the_operator_describes_itself_to_the_compiler() -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.tile_hash.default, Pieces(list(SHAPES.values())[:6]).arguments(), test_utils=checks)
