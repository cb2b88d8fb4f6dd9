"""The hash of the servers' parameters, from parts that different ranks hold: one launch for all parts of a rank.

``tile_hash_reference.py`` defines the hash. A rank hashes what it has of many parameters (``hash_pieces``), and the
``TileSums`` of one parameter are merged, in any order and wherever they come from, until they are complete.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from megatron_dppo.errors import WeightSyncError
from megatron_dppo.ops.backend import native_operators
from megatron_dppo.rollout.sglang import tile_hash_reference
from megatron_dppo.rollout.sglang.tile_hash_reference import (
    MASK32,
    MASK64,
    TILE_WORDS,
    finished_parameter,
    finished_tile,
)

Key = TypeVar("Key", bound=Hashable)


class Piece(NamedTuple):
    """A matrix of a server's parameter, flattened row by row into it from word ``first_word`` on.

    ``source`` [present rows, present columns], its columns contiguous, is what there is of ``rows`` x ``columns``; the
    rest is 0, as the server pads it. The elements have 2, 4 or 8 bytes, and are whole words of 4 bytes together.
    """

    source: torch.Tensor
    rows: int
    columns: int
    first_word: int

    @property
    def num_words(self) -> int:
        """Raises ValueError if the piece is no whole number of words."""
        num_bytes = self.rows * self.columns * self.source.element_size()
        if num_bytes % 4:
            size = f"{self.rows} x {self.columns} elements of {self.source.dtype}"
            raise ValueError(f"{size} cannot be hashed: {num_bytes} bytes are not whole words of 4 bytes")
        return num_bytes // 4


class TileSums:
    """The hash of some words of a parameter, to which those of the others can be merged.

    A tile of which all words are in is part of one 64-bit sum; of the others, at most two for each range of words, both
    sums are kept. So it is small, whatever the parameter's size.
    """

    def __init__(self, num_words: int) -> None:
        """``num_words``: of the whole parameter, as the server has it. No word is in yet."""
        self.num_words = num_words
        self._covered: list[tuple[int, int]] = []  # ranges of words (first, end), sorted, with gaps between them
        self._finished = 0  # sum of the complete tiles, modulo 2**64
        self._open: dict[int, tuple[int, int]] = {}  # tile -> its two sums so far

    def merge(self, other: TileSums) -> None:
        """Take over the words of ``other``.

        Raises:
            WeightSyncError: it is of a parameter of another size, or some words are in both. Nothing was merged then.
        """
        if other.num_words != self.num_words:
            raise WeightSyncError(f"a hash of {other.num_words} words cannot be part of one of {self.num_words}")
        self._covered = _union(self._covered + other._covered)
        self._finished = (self._finished + other._finished) & MASK64
        for tile, sums in other._open.items():
            self._add_open(tile, *sums)
        for tile in [tile for tile in other._open if self._is_covered(tile)]:
            self._finished = (self._finished + finished_tile(*self._open.pop(tile), 4 * self.num_words)) & MASK64

    def is_complete(self) -> bool:
        """Whether every word is in."""
        return not self.missing_words()

    def missing_words(self) -> list[range]:
        """The words that are not in, as ranges in ascending order."""
        edges = [0, *(edge for covered in self._covered for edge in covered), self.num_words]
        gaps = [range(first, end) for first, end in zip(edges[::2], edges[1::2], strict=True)]
        return [gap for gap in gaps if gap]

    def hexdigest(self) -> str:
        """The 16 hexadecimal digits that a server reports for the parameter. Raises WeightSyncError if words are missing."""
        if missing := self.missing_words():
            raise WeightSyncError(f"words {_listed(missing[0])} of {self.num_words} were not hashed")
        return finished_parameter(self._finished)

    def to_tensor(self) -> torch.Tensor:
        """All of it as a flat int64 tensor on the CPU, to be sent to another rank."""
        finished = self._finished - (self._finished >> 63 << 64)  # two's complement
        edges = [edge for covered in self._covered for edge in covered]
        tiles = [number for tile, sums in self._open.items() for number in (tile, *sums)]
        return torch.tensor([self.num_words, finished, len(edges), *edges, *tiles], dtype=torch.int64, device="cpu")

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> TileSums:
        """The inverse of ``to_tensor``."""
        num_words, finished, num_edges, *numbers = tensor.tolist()
        edges, tiles = numbers[:num_edges], numbers[num_edges:]
        sums = cls(num_words)
        sums._finished = finished & MASK64
        sums._covered = list(zip(edges[::2], edges[1::2], strict=True))
        sums._open = {tiles[i]: (tiles[i + 1], tiles[i + 2]) for i in range(0, len(tiles), 3)}
        return sums

    def _add_open(self, tile: int, first_sum: int, second_sum: int) -> None:
        ours = self._open.get(tile, (0, 0))
        self._open[tile] = ((ours[0] + first_sum) & MASK32, (ours[1] + second_sum) & MASK32)

    def _is_covered(self, tile: int) -> bool:
        first, end = tile * TILE_WORDS, min((tile + 1) * TILE_WORDS, self.num_words)
        place = bisect.bisect_right(self._covered, (first, self.num_words)) - 1
        return place >= 0 and end <= self._covered[place][1]

    def _enter(self, first: int, end: int, sums: Any, finished: Any) -> None:
        """A range of words behind all others, with a gap: arrays of its tiles' sums [2, tiles] and the same finished."""
        self._covered.append((first, end))
        first_tile, tiles = first // TILE_WORDS, len(finished)
        # Its complete tiles; the parameter's last one is shorter than others.
        begin = -(-first // TILE_WORDS) - first_tile
        until = tiles if end == self.num_words else end // TILE_WORDS - first_tile
        if begin < until:
            self._finished = (self._finished + int(finished[begin:until].sum())) & MASK64
        for tile in {*range(begin), *range(until, tiles)}:
            self._add_open(first_tile + tile, int(sums[0, tile]) & MASK32, int(sums[1, tile]) & MASK32)


class _Range(NamedTuple):
    """Neighbouring words of a parameter; their tiles have neighbouring columns of the sums."""

    first: int
    end: int
    column: int

    @property
    def columns(self) -> int:
        return _tiles(self.first, self.end)


def hash_pieces(pieces_of: Mapping[Key, tuple[int, Sequence[Piece]]]) -> dict[Key, TileSums]:
    """Hash what this rank has of each parameter: key -> (number of words of the whole parameter, pieces of it).

    The pieces of all parameters, on one device, are read by one launch of the compiled kernel where there is one, and
    their sums are brought to the host at once.

    Raises:
        ValueError: a piece is no whole number of words, or lies beyond its parameter; the message has the key.
        WeightSyncError: two pieces of a parameter have words in common; the message has the key.
    """
    pieces: list[Piece] = []
    columns: list[int] = []  # of each piece's first tile
    ranges_of: dict[Key, list[_Range]] = {}
    num_columns = 0
    for key, (num_words, given) in pieces_of.items():
        own = [piece for piece in given if piece.rows and piece.columns]
        try:
            covered = _covered_by(own, num_words)
        except (ValueError, WeightSyncError) as error:
            raise type(error)(f"{key}: {error}") from error
        ranges_of[key] = []
        for first, end in covered:
            ranges_of[key].append(_Range(first, end, num_columns))
            num_columns += ranges_of[key][-1].columns
        for piece in own:
            place = bisect.bisect_right(covered, (piece.first_word, num_words)) - 1
            first, _, column = ranges_of[key][place]
            columns.append(column + piece.first_word // TILE_WORDS - first // TILE_WORDS)
        pieces += own
    sums = torch.zeros(2, 0, dtype=torch.int64, device="cpu")
    if pieces:
        sums = tile_sums(pieces, columns, num_columns).cpu().to(torch.int64)
    columns_of_key = [sum(words.columns for words in ranges) for ranges in ranges_of.values()]
    num_bytes = np.repeat(np.array([4 * num_words for num_words, _ in pieces_of.values()], np.int64), columns_of_key)
    finished = finished_tile(sums[0], sums[1], torch.from_numpy(num_bytes)).numpy()
    result = {key: TileSums(num_words) for key, (num_words, _) in pieces_of.items()}
    sums_of_columns = sums.numpy()
    for key, ranges in ranges_of.items():
        for words in ranges:
            part = slice(words.column, words.column + words.columns)
            result[key]._enter(words.first, words.end, sums_of_columns[:, part], finished[part])
    return result


@torch.no_grad()
def tile_sums(pieces: Sequence[Piece], columns: Sequence[int], num_columns: int) -> torch.Tensor:
    """int32 [2, num_columns], on the pieces' device: the sums of piece i's tiles are added from ``columns[i]`` on."""
    device = pieces[0].source.device
    operators = native_operators(device)
    tile_hash = tile_hash_reference.tile_hash if operators is None else operators.tile_hash
    sums = torch.zeros(2, num_columns, dtype=torch.int32, device=device)
    sources, rows, widths, first_words = (list(values) for values in zip(*pieces, strict=True))
    tile_hash(sums, sources, rows, widths, first_words, columns)
    return sums


def _covered_by(pieces: Sequence[Piece], num_words: int) -> list[tuple[int, int]]:
    ranges = [(piece.first_word, piece.first_word + piece.num_words) for piece in pieces]
    for first, end in ranges:
        if first < 0 or end > num_words:
            raise ValueError(f"words {_listed(range(first, end))} are not in a parameter of {num_words}")
    return _union(ranges)


def _union(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same words in sorted ranges with gaps between them. Raises WeightSyncError if a word is in two."""
    joined: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if joined and first < joined[-1][1]:
            raise WeightSyncError(f"words {_listed(range(first, min(end, joined[-1][1])))} were hashed twice")
        if joined and first == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return joined


def _tiles(first: int, end: int) -> int:
    """How many tiles hold words of a range that is not empty."""
    return (end - 1) // TILE_WORDS - first // TILE_WORDS + 1


def _listed(words: range) -> str:
    return f"{words.start} to {words.stop - 1}"
