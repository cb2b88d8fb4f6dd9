"""The checksums that SGLang's ``/weights_checker`` must report after an update, computed while the weights are
exported.

The server hashes each of its parameters: with SHA-256 on a CPU, with a hash made for GPUs on a GPU. Both are computed
here piece by piece, so nothing but the exported stream is read and no fused copy of a parameter is ever built.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch

from megatron_dppo.errors import WeightSyncError
from megatron_dppo.rollout.sglang.parameter_layout import ModelShape, ServerRank, part_name, placement, shard


class Hash(Protocol):
    """A running hash over the bytes of a parameter."""

    def update(self, tensor: torch.Tensor) -> None:
        """Append the bytes of a contiguous tensor."""
        ...

    def hexdigest(self) -> str:
        """The 16 hexadecimal digits that the server reports for these bytes."""
        ...


class CPUTensorHash:
    """What a CPU server reports: the first 8 bytes of the SHA-256 of the parameter's bytes."""

    def __init__(self) -> None:
        self._state = hashlib.sha256()

    def update(self, tensor: torch.Tensor) -> None:
        """Append the bytes of a contiguous tensor."""
        self._state.update(_bytes(tensor).cpu().numpy().data)

    def hexdigest(self) -> str:
        """The 16 hexadecimal digits that the server reports for these bytes."""
        return self._state.digest()[:8].hex()


_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK32)
_POSITION_FACTORS = (0x27D4EB2D, 0x165667B1)
_POSITION_ROTATIONS = (15, 13)
_TILE_WORDS = 8192
_CHUNK_TILES = 512  # 16 MiB of weights at a time bounds the int64 temporaries below


class GPUTensorHash:
    """What a GPU server reports: two 32-bit hashes of each tile of 8192 words, summed over the tiles to one 64-bit
    value.

    Word i of the parameter enters as fmix32(word ^ mix(i)), added up within its tile; that sum does not depend on
    order, so pieces can be added as they come. Runs on the device of the tensors; unsigned 32-bit arithmetic is done in
    int64.
    """

    def __init__(self) -> None:
        self._words = 0
        self._tile_sums: list[tuple[int, torch.Tensor]] = []  # (first tile, [2, tiles] sums modulo 2**32)

    def update(self, tensor: torch.Tensor) -> None:
        """Append the bytes of a contiguous tensor, whose size must be a multiple of 4 bytes."""
        data = _bytes(tensor)
        if data.numel() % 4:
            raise ValueError(f"a tensor of {data.numel()} bytes cannot be hashed in 32-bit words")
        for words in data.view(torch.int32).split(_CHUNK_TILES * _TILE_WORDS):
            self._add(words)

    def _add(self, words: torch.Tensor) -> None:
        positions = torch.arange(self._words, self._words + words.numel(), device=words.device)
        tiles = positions // _TILE_WORDS
        first, last = self._words // _TILE_WORDS, (self._words + words.numel() - 1) // _TILE_WORDS
        sums = torch.zeros(2, last - first + 1, dtype=torch.int64, device=words.device)
        values = words.to(torch.int64) & _MASK32
        positions = positions & _MASK32
        for row in range(2):
            rotation = _POSITION_ROTATIONS[row]
            rotated = ((positions << rotation) & _MASK32) | (positions >> (32 - rotation))
            mixed = ((positions * _POSITION_FACTORS[row] + _SEEDS[row]) & _MASK32) ^ rotated
            sums[row].index_add_(0, tiles - first, _fmix32(values ^ mixed))
        self._tile_sums.append((first, sums & _MASK32))
        self._words += words.numel()

    def hexdigest(self) -> str:
        """The 16 hexadecimal digits that the server reports for these bytes."""
        if self._words == 0:
            return f"{0:016x}"
        sums = torch.zeros(2, -(-self._words // _TILE_WORDS), dtype=torch.int64)
        for first, part in self._tile_sums:
            sums[:, first : first + part.shape[1]] += part.cpu()
        high, low = _fmix32((sums & _MASK32) ^ (self._words * 4 & _MASK32)).tolist()
        return f"{_splitmix64(sum((h << 32) | w for h, w in zip(high, low, strict=True))):016x}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _fmix32(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's final mixing, on unsigned 32-bit values held in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def _splitmix64(x: int) -> int:
    x &= _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


class _ParameterHash:
    """One parameter of one rank. Parts may arrive in any order; one that is early is kept until its turn."""

    def __init__(self, hash_: Hash, parts: int) -> None:
        self._hash = hash_
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
        self._hash = GPUTensorHash if device_type == "cuda" else CPUTensorHash
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
                parameters[place.parameter] = _ParameterHash(self._hash(), place.parts)
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
