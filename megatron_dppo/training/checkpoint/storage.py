"""Pieces of tensors to and from a folder, through ``torch.distributed.checkpoint``.

Every rank writes a file of its own. Where several ranks hold the same piece, one of them writes it, chosen so that they
write about as much each. When reading, each rank reads of each file what it needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_dppo.distributed.host_group import host_group
from megatron_dppo.errors import CheckpointError
from megatron_dppo.training.checkpoint.pieces import Piece


def write_pieces(pieces: Sequence[Piece], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write all ranks' pieces. It has returned on any rank only if all is on disk.

    Collective over ``group``; None: over all ranks, by way of gloo.

    Raises:
        CheckpointError: on every rank alike, if any rank could not write.
    """
    try:
        # The planner has the pieces, so that the state dict that torch would otherwise plan with is empty.
        save(
            {},
            storage_writer=FileSystemWriter(folder),
            planner=_SavePlanner(pieces),
            process_group=group or host_group(),
        )
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: the checkpoint was not written: {_first_failure(error)}") from error


def read_pieces(pieces: Sequence[Piece], folder: Path) -> None:
    """Fill the pieces' values. Collective over all ranks.

    Raises:
        CheckpointError: on every rank alike; ``values`` may then be partly filled.
    """
    try:
        load({}, storage_reader=FileSystemReader(folder), planner=_LoadPlanner(pieces), process_group=host_group())
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: the checkpoint does not load: {_first_failure(error)}") from error


class _SavePlanner(DefaultSavePlanner):
    """Plans with pieces. The base class removes duplicates and checks that the pieces cover each tensor exactly once."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = _by_index([piece for piece in pieces if piece.is_saved])

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index,
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=_chunk(piece),
                        properties=TensorProperties.create_from_tensor(piece.values),
                        size=torch.Size(piece.whole_shape),
                    ),
                )
                for index, piece in self._pieces.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._pieces[index].values


class _LoadPlanner(DefaultLoadPlanner):
    """Plans with pieces."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = _by_index(pieces)

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, group in itertools.groupby(sorted(self._pieces.values(), key=attrgetter("name")), attrgetter("name")):
            wanted = list(group)
            stored = self.metadata.state_dict_metadata.get(name) if self.metadata is not None else None
            if not isinstance(stored, TensorStorageMetadata):
                raise ValueError(f"it has no {name}")
            if tuple(stored.size) != wanted[0].whole_shape:
                raise ValueError(f"its {name} is {list(stored.size)}, the policy's is {list(wanted[0].whole_shape)}")
            items += create_read_items_for_chunk_list(name, stored, [_chunk(piece) for piece in wanted])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._pieces[index].values


def _by_index(pieces: Sequence[Piece]) -> dict[MetadataIndex, Piece]:
    found = {MetadataIndex(piece.name, torch.Size(piece.offset)): piece for piece in pieces}
    if len(found) != len(pieces):
        raise RuntimeError("two tensors of this rank are the same piece of a checkpoint")
    return found


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(piece.offset), sizes=piece.values.size())


def _first_failure(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {cause}"
