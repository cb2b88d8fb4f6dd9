"""Which tensor of a parameter is wrong, where a server keeps several in one: q, k and v, or the experts of a layer.

Asked only when a parameter's hash is wrong (checksums.py). The server hashes its parts (server_plugin/part_hashes.py), and
whoever sent the tensors hashes them again, each by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_dppo.rollout.sglang.checksums import ExpectedChecksums, Held
from megatron_dppo.rollout.sglang.server_plugin.part_hashes import ASKED_BY
from megatron_dppo.rollout.sglang.tile_hash import hash_pieces


@dataclass(frozen=True)
class Part:
    """What a server's rank has of a tensor.

    Attributes:
        tensor: by its name in the checkpoint.
        held: rank and parameter.
        first_word: of it in the parameter.
        end_word: after it.
    """

    tensor: str
    held: Held
    first_word: int
    end_word: int

    @property
    def key(self) -> str:
        """What the server calls it."""
        return f"{self.held.parameter} {self.first_word} {self.end_word}"


def request_for(parts: Iterable[Part]) -> str:
    """The entry of ``skip_tensor_list`` that asks for their hashes."""
    wanted: dict[str, dict[int, list[tuple[int, int]]]] = {}
    for part in parts:
        of_rank = wanted.setdefault(part.held.parameter, {}).setdefault(part.held.rank, [])
        of_rank.append((part.first_word, part.end_word))
    return ASKED_BY + json.dumps(wanted)


def hash_parts(
    kind: ExpectedChecksums, parts: Iterable[Part], tensors: Iterable[tuple[str, torch.Tensor]]
) -> dict[Part, str]:
    """The hash of each part of one of these tensors: (name, in the dtype that is served)."""
    at = {(part.tensor, part.held): part for part in parts}
    pieces = {}
    for name, tensor in tensors:
        for held, (_, piece) in kind.pieces(name, tensor).items():
            if (part := at.get((name, held))) is not None:
                pieces[part] = (piece.num_words, [piece._replace(first_word=0)])
    return {part: sums.hexdigest() for part, sums in hash_pieces(pieces).items()}


def parts_of(kind: ExpectedChecksums, differing: Mapping[str, Sequence[int]]) -> list[Part]:
    """Of parameters, each on ranks where it differs; none of those that are one tensor."""
    return [
        Part(tensor, held, first, end)
        for parameter, ranks in sorted(differing.items())
        for tensor, held, first, end in kind.words_of_tensors(parameter)
        if held.rank in ranks
    ]
