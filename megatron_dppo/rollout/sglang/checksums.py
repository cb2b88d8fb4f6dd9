"""The checksums that SGLang's ``/weights_checker`` must report after an update, computed while the weights are
exported.

The server hashes each of its parameters with a hash made for GPUs (tile_hash_reference.py; a CPU server is made to:
cpu_shim/). It is computed here piece by piece, so nothing but the exported stream is read and no fused copy of a parameter
is ever built.
"""

from __future__ import annotations

import torch

from megatron_dppo.errors import WeightSyncError
from megatron_dppo.rollout.sglang.parameter_layout import ModelShape, ServerRank, part_name, placement, shard
from megatron_dppo.rollout.sglang.tile_hash import Piece, tile_sums
from megatron_dppo.rollout.sglang.tile_hash_reference import TILE_WORDS, finished_parameter, finished_tile


class RunningHash:
    """What a server reports for a parameter, from its parts in their order; the number of its words is known at the end.

    Runs on the device of the tensors.
    """

    def __init__(self) -> None:
        self._words = 0
        self._sums: list[tuple[int, torch.Tensor]] = []  # (first tile, int32 [2, tiles] sums modulo 2**32)

    def update(self, tensor: torch.Tensor) -> None:
        """Append the bytes of a contiguous tensor, whose size must be a multiple of 4 bytes."""
        row = tensor.detach().reshape(1, -1)
        piece = Piece(row, 1, row.shape[1], self._words)
        first, end = self._words // TILE_WORDS, -(-(self._words + piece.num_words) // TILE_WORDS)
        self._sums.append((first, tile_sums([piece], [0], end - first)))
        self._words += piece.num_words

    def hexdigest(self) -> str:
        """The 16 hexadecimal digits that the server reports for these bytes."""
        sums = torch.zeros(2, -(-self._words // TILE_WORDS), dtype=torch.int64, device="cpu")
        for first, part in self._sums:
            sums[:, first : first + part.shape[1]] += part.cpu()
        num_bytes = torch.full_like(sums[0], 4 * self._words)
        return finished_parameter(int(finished_tile(sums[0], sums[1], num_bytes).sum()))


class _ParameterHash:
    """One parameter of one rank. Parts may arrive in any order; one that is early is kept until its turn."""

    def __init__(self, parts: int) -> None:
        self._hash = RunningHash()
        self._parts = parts
        self._next = 0
        self._early: dict[int, torch.Tensor] = {}

    def add(self, part: int, tensor: torch.Tensor, name: str) -> None:
        if part < self._next or part in self._early or part >= self._parts:
            raise WeightSyncError(f"{name} was exported twice, or does not belong to the model that is served")
        self._early[part] = tensor
        while self._next in self._early:
            self._hash.update(self._early.pop(self._next))
            self._next += 1
        if part in self._early:
            self._early[part] = tensor.clone()  # the exporter may reuse its buffer

    def missing(self) -> list[int]:
        return [part for part in range(self._next, self._parts) if part not in self._early]

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class ExpectedChecksums:
    """Collects an export and says what every rank of a server with ``tp_size`` ranks must report for it."""

    def __init__(self, shape: ModelShape, tp_size: int, device_type: str) -> None:
        self._shape = shape
        self._tp_size = tp_size
        self._device_type = device_type
        self._ranks: list[dict[str, _ParameterHash]] = [{} for _ in range(tp_size)]
        self._sources: dict[str, list[str]] = {}

    def add(self, hf_name: str, tensor: torch.Tensor) -> None:
        """Take a full tensor, in the dtype that the server keeps."""
        place = placement(hf_name, self._shape)
        if place is None:
            return
        self._sources.setdefault(place.parameter, []).append(hf_name)
        for tp_rank, parameters in enumerate(self._ranks):
            if place.parameter not in parameters:
                parameters[place.parameter] = _ParameterHash(place.parts)
            rank = ServerRank(tp_rank, self._tp_size, self._device_type)
            piece = shard(tensor, place, rank, self._shape, hf_name)
            parameters[place.parameter].add(place.part, piece, hf_name)

    def compare(self, reported: list[dict[str, str]]) -> list[str]:
        """Faults in the checksums that each rank reported, in words; none if the server holds what was exported."""
        if len(reported) != self._tp_size:
            return [f"{len(reported)} ranks reported checksums instead of {self._tp_size}"]
        faults: dict[str, str] = {}
        for expected, found in zip(self._ranks, reported, strict=True):
            for parameter in found.keys() - expected.keys():
                faults[parameter] = f"{self._parts_of(parameter)} was never sent"
            for parameter, hash_ in expected.items():
                sources = self._sources[parameter]
                if parameter not in found:
                    faults[parameter] = f"{_listed(sources)} was sent, but the server has no parameter for it"
                elif hash_.missing():
                    names = [part_name(parameter, part) for part in hash_.missing()]
                    faults[parameter] = f"{_listed(names)} was never sent"
                elif hash_.hexdigest() != found[parameter]:
                    faults[parameter] = f"{_listed(sources)}: the server's {parameter} differs from what was exported"
        return [faults[parameter] for parameter in sorted(faults)]

    def _parts_of(self, parameter: str) -> str:
        for fused, parts in (("qkv_proj", 3), ("gate_up_proj", 2), ("w13_weight", 2 * self._shape.num_experts)):
            if fused in parameter:
                return _listed([part_name(parameter, part) for part in range(parts)])
        if parameter.endswith("w2_weight"):
            return _listed([part_name(parameter, part) for part in range(self._shape.num_experts)])
        return parameter


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} ... {names[-1]} ({len(names)} tensors)"
