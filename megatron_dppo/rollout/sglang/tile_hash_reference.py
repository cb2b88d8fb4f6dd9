"""The hash by which SGLang's servers report what weights they hold, in plain torch: the definition of the kernel.

A parameter is a sequence of 32-bit words. Word i enters as fmix32(word ^ mix(i)), for two functions mix, and is added up
modulo 2**32 within its tile of 8192 words. At the end a tile's two sums are mixed with the parameter's number of bytes and
joined to 64 bits, which are added up over the tiles and mixed once more. Sums are free of order, so the parts of a
parameter can be hashed apart.

Unsigned 32-bit arithmetic is done in int64. This file imports torch alone: a server's process loads it by its path
(cpu_shim/sitecustomize.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

Words = TypeVar("Words", int, torch.Tensor)

TILE_WORDS = 8192
MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & MASK32)
_POSITION_FACTORS = (0x27D4EB2D, 0x165667B1)
_POSITION_ROTATIONS = (15, 13)
_CHUNK_WORDS = 512 * TILE_WORDS  # 16 MiB of weights at a time bounds the int64 temporaries below


def tile_hash(
    sums: torch.Tensor,
    sources: Sequence[torch.Tensor],
    rows: Sequence[int],
    columns: Sequence[int],
    first_words: Sequence[int],
    first_tiles: Sequence[int],
) -> None:
    """The operator ``torch.ops.megatron_dppo.tile_hash`` (csrc/operators/tile_hash.cpp), but for its checks.

    Args:
        sums: int32 [2, tiles], to which the sums of every piece's words are added, modulo 2**32.
        sources: of each piece the matrix [present rows, present columns] in memory.
        rows, columns: its size in the parameter; what the source has not is 0.
        first_words: where it begins in its parameter, into which it is flattened row by row.
        first_tiles: the column of ``sums`` that is for the tile of its first word.
    """
    for source, num_rows, num_columns, first_word, first_tile in zip(
        sources, rows, columns, first_words, first_tiles, strict=True
    ):
        if source.shape != (num_rows, num_columns):
            padded = source.new_zeros(num_rows, num_columns)
            padded[: source.shape[0], : source.shape[1]] = source
            source = padded
        words, begin = words_of(source), first_word
        for chunk in words.split(_CHUNK_WORDS) if words.numel() else ():
            part = sums_of_tiles(chunk, begin)
            tile = first_tile + begin // TILE_WORDS - first_word // TILE_WORDS
            sums[:, tile : tile + part.shape[1]] += part
            begin += chunk.numel()


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    """int32 [n]: the tensor's bytes, and zeros up to a whole word."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() % 4:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 4))
    return data.view(torch.int32)


def sums_of_tiles(words: torch.Tensor, first_word: int) -> torch.Tensor:
    """int32 [2, tiles]: the sums of neighbouring words, for each tile that they lie in."""
    positions = torch.arange(first_word, first_word + words.numel(), device=words.device)
    tiles = positions // TILE_WORDS - first_word // TILE_WORDS
    last = (first_word + words.numel() - 1) // TILE_WORDS
    sums = torch.zeros(2, last - first_word // TILE_WORDS + 1, dtype=torch.int64, device=words.device)
    values = words.to(torch.int64) & MASK32
    positions = positions & MASK32
    for row in range(2):
        rotation = _POSITION_ROTATIONS[row]
        rotated = ((positions << rotation) & MASK32) | (positions >> (32 - rotation))
        mixed = ((positions * _POSITION_FACTORS[row] + _SEEDS[row]) & MASK32) ^ rotated
        sums[row].index_add_(0, tiles, _fmix32(values ^ mixed))
    return sums.to(torch.int32)


def finished_tile(first_sum: Words, second_sum: Words, num_bytes: Words) -> Words:
    """What a tile adds to its parameter's 64-bit sum (modulo 2**64; as int64 if these are tensors)."""
    low_bytes = num_bytes & MASK32
    return (_fmix32((first_sum & MASK32) ^ low_bytes) << 32) | _fmix32((second_sum & MASK32) ^ low_bytes)


def finished_parameter(total: int) -> str:
    """The 16 hexadecimal digits that a server reports, from the sum over all tiles."""
    total &= MASK64
    total = ((total ^ (total >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    total = ((total ^ (total >> 27)) * 0x94D049BB133111EB) & MASK64
    return f"{total ^ (total >> 31):016x}"


def checksum(tensor: torch.Tensor) -> str:
    """What a server reports for a parameter with these contents."""
    words = words_of(tensor)
    sums = torch.zeros(2, -(-words.numel() // TILE_WORDS), dtype=torch.int32, device=words.device)
    tile_hash(sums, [words[None]], [1], [words.numel()], [0], [0])
    tiles = sums.to(torch.int64)
    num_bytes = torch.full_like(tiles[0], 4 * words.numel())
    return finished_parameter(int(finished_tile(tiles[0], tiles[1], num_bytes).sum()))


def _fmix32(x: Words) -> Words:
    """MurmurHash3's final mixing."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK32
    return x ^ (x >> 16)
