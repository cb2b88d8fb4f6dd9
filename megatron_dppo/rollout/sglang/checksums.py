"""What SGLang's ``/weights_checker`` must report after an update, computed by the senders while they send.

A server reports a 64-bit hash of each parameter of each of its ranks (tile_hash.py). Of what it sends a sender knows to which
words of which parameter it goes, hashes it there, and what all senders have found is added up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_dppo.errors import WeightSyncError
from megatron_dppo.models.hf.export import NamedShape
from megatron_dppo.rollout.sglang.parameter_layout import (
    Cut,
    ModelShape,
    ServerLayout,
    Split,
    cut,
    part_name,
    placement,
)
from megatron_dppo.rollout.sglang.tile_hash import Piece, TileSums, hash_pieces

_WORD_BYTES = 4


class Held(NamedTuple):
    """A parameter of a server's rank; those that all ranks hold alike are known as the first one's."""

    rank: int
    parameter: str


@dataclass(frozen=True)
class _Place:
    """Where a tensor, or what a rank gets of it, begins in a parameter."""

    held: Held
    cut: Cut
    first_word: int


class ExpectedChecksums:
    """The hashes of one kind of server after an update of which ``tensors`` are the whole. Every rank makes the same."""

    def __init__(
        self, tensors: Iterable[NamedShape], shape: ModelShape, layout: ServerLayout, dtype: torch.dtype
    ) -> None:
        """Raises WeightSyncError for a tensor that is there twice, or that the server cannot divide."""
        self._shape = shape
        self._layout = layout
        self._itemsize = dtype.itemsize
        self._sources: dict[str, dict[int, str]] = {}  # parameter -> part -> tensor
        self._missing: dict[str, list[str]] = {}
        self._held_by_all: set[str] = set()
        self._places: dict[str, list[_Place]] = {}  # of a tensor
        self._num_words: dict[Held, int] = {}
        self._sums: dict[Held, TileSums] = {}
        self._lay_out(tensors)

    def emptied(self) -> ExpectedChecksums:
        """The same, of which nothing was hashed yet: what is where is worked out once for all updates."""
        copied = copy(self)
        copied._sums = {}
        return copied

    def _lay_out(self, tensors: Iterable[NamedShape]) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor_shape in tensors:
            place = placement(name, self._shape)
            if place is None:
                continue
            sources = self._sources.setdefault(place.parameter, {})
            if place.part in sources:
                raise WeightSyncError(f"{name} is exported twice")
            sources[place.part] = name
            shapes[name] = tensor_shape
        for parameter, sources in self._sources.items():
            place = placement(next(iter(sources.values())), self._shape)
            assert place is not None
            missing = [part for part in range(place.parts) if part not in sources]
            if missing:  # so nobody knows where the others begin
                self._missing[parameter] = [part_name(parameter, part) for part in missing]
                continue
            if place.split is Split.NONE:
                self._held_by_all.add(parameter)
            parts = [(sources[part], shapes[sources[part]]) for part in sorted(sources)]
            for rank in range(self._layout.ranks_with_own_parts(place.split)):
                self._lay_out_on(Held(rank, parameter), parts)

    def _lay_out_on(self, held: Held, parts: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        num_bytes = 0
        for name, tensor_shape in parts:
            place = placement(name, self._shape)
            assert place is not None
            if not self._layout.holds(held.rank, place):
                continue
            part = cut(name, tensor_shape, place, held.rank, self._layout, self._shape)
            self._places.setdefault(name, []).append(_Place(held, part, num_bytes // _WORD_BYTES))
            num_bytes += part.rows * part.columns * self._itemsize
            if num_bytes % _WORD_BYTES:
                raise WeightSyncError(
                    f"{name}: {held.parameter} would be cut within a word of {_WORD_BYTES} bytes there"
                )
        self._num_words[held] = num_bytes // _WORD_BYTES

    def compare(self, reported: Sequence[tuple[int, dict[str, str]]]) -> list[str]:
        """Faults in what ranks reported, in words; none if the server holds what was exported. See ``faults``."""
        return list(self.faults(reported).values())

    def faults(self, reported: Sequence[tuple[int, dict[str, str]]]) -> dict[str, str]:
        """Parameter -> what is wrong with it, in words; in their order.

        ``reported``: (rank, its checksum of each of its parameters). With DP attention a rank reports several times.
        """
        ranks = {rank for rank, _ in reported}
        if ranks != set(range(self._layout.tp_size)):
            return {"": f"ranks {sorted(ranks)} reported checksums instead of {self._layout.tp_size} ranks"}
        faults: dict[str, str] = {}
        for rank, found in reported:
            for parameter in found.keys() - self._sources.keys():
                faults[parameter] = f"{self._parts_of(parameter)} was never sent"
            for parameter, by_part in self._sources.items():
                sources = list(by_part.values())
                if parameter not in found:
                    faults[parameter] = f"{_listed(sources)} was sent, but the server has no parameter for it"
                elif parameter in self._missing:
                    faults[parameter] = f"{_listed(self._missing[parameter])} was never sent"
                elif self._hash_of(rank, parameter) != found[parameter]:
                    faults[parameter] = differs(sources, parameter)
        return {parameter: faults[parameter] for parameter in sorted(faults)}

    def differing(self, reported: Sequence[tuple[int, dict[str, str]]]) -> dict[str, list[int]]:
        """Parameter -> ranks whose hash of it is wrong, of parameters that several tensors are in."""
        found: dict[str, list[int]] = {}
        for rank, hashes in sorted(dict(reported).items()):
            for parameter, sources in self._sources.items():
                expected = self._hash_of(rank, parameter)
                if len(sources) > 1 and expected is not None and hashes.get(parameter, expected) != expected:
                    found.setdefault(parameter, []).append(rank)
        return found

    def words_of_tensors(self, parameter: str) -> Iterator[tuple[str, Held, int, int]]:
        """(tensor, on which rank, its first word, its end) of all that a parameter is made of."""
        for tensor in self._sources[parameter].values():
            for place in self._places.get(tensor, ()):
                words = place.cut.rows * place.cut.columns * self._itemsize // _WORD_BYTES
                yield tensor, place.held, place.first_word, place.first_word + words

    def _hash_of(self, rank: int, parameter: str) -> str | None:
        """None for one of which not all words were hashed."""
        sums = self._sums.get(Held(0 if parameter in self._held_by_all else rank, parameter))
        return sums.hexdigest() if sums is not None and sums.is_complete() else None

    def _parts_of(self, parameter: str) -> str:
        for fused, parts in (("qkv_proj", 3), ("gate_up_proj", 2), ("w13_weight", 2 * self._shape.num_experts)):
            if fused in parameter:
                return _listed([part_name(parameter, part) for part in range(parts)])
        if parameter.endswith("w2_weight"):
            return _listed([part_name(parameter, part) for part in range(self._shape.num_experts)])
        return parameter

    def pieces(self, name: str, tensor: torch.Tensor) -> dict[Held, tuple[int, Piece]]:
        """Which words of which parameters ``tensor`` becomes; each with the parameter's number of words."""
        return {
            place.held: (
                self._num_words[place.held],
                Piece(place.cut.of(tensor), place.cut.rows, place.cut.columns, place.first_word),
            )
            for place in self._places.get(name, ())
        }

    def add(self, held: Held, sums: TileSums) -> None:
        """Add what was found of a parameter. Raises WeightSyncError if some of it had been found before."""
        if held not in self._sums:
            self._sums[held] = sums
            return
        try:
            self._sums[held].merge(sums)
        except WeightSyncError as error:
            raise WeightSyncError(f"{_listed(list(self._sources[held.parameter].values()))} was sent twice") from error

    def to_tensor(self) -> torch.Tensor:
        """[n] int64: all that was found here, to be added up elsewhere (``add_tensor``)."""
        fields = []
        for number, held in enumerate(sorted(self._num_words)):
            if held in self._sums:
                content = self._sums[held].to_tensor()
                fields += [torch.tensor([number, len(content)]), content]
        return torch.cat(fields) if fields else torch.empty(0, dtype=torch.int64)

    def add_tensor(self, found: torch.Tensor) -> None:
        """Add what another rank's ``to_tensor`` gave."""
        all_held, start = sorted(self._num_words), 0
        while start < len(found):
            number, length = found[start : start + 2].tolist()
            self.add(all_held[number], TileSums.from_tensor(found[start + 2 : start + 2 + length]))
            start += 2 + length


def hash_tensors(kinds: Sequence[ExpectedChecksums], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Add whole tensors, in the dtype that is served, to what every kind of server is to hold: one launch for all."""
    wanted: dict[tuple[int, Held], tuple[int, list[Piece]]] = {}
    for (name, tensor), (number, kind) in itertools.product(tensors, enumerate(kinds)):
        for held, (num_words, piece) in kind.pieces(name, tensor).items():
            wanted.setdefault((number, held), (num_words, []))[1].append(piece)
    for (number, held), sums in hash_pieces(wanted).items():
        kinds[number].add(held, sums)


def differs(tensors: list[str], parameter: str) -> str:
    """The fault of a parameter that is wrong in one of these tensors."""
    return f"{_listed(tensors)}: the server's {parameter} differs from what was exported"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} ... {names[-1]} ({len(names)} tensors)"
