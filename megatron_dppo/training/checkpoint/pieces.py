"""What a checkpoint holds: pieces of whole tensors, under names into which no parallel layout enters.

A parameter goes by its whole-model name (models/sharding.py) and has the shape that it has on one rank, without padded
vocabulary rows; its optimizer state has the parameter's shape. Each rank holds rectangles of these tensors: tensor
parallelism cuts rows or columns; the distributed optimizer cuts the flattened remainder anywhere, which leaves at most
three rectangles (the end of a row, whole rows, the beginning of a row). As only whole tensors have names in a checkpoint,
every layout can read what any other wrote: TP, PP, VPP, EP, CP, DP, either kind of optimizer, either layer spec.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from transformers import PretrainedConfig

from megatron_dppo.models.hf.names import EMBEDDING, OUTPUT_LAYER, hf_shapes
from megatron_dppo.models.sharding import cut_shard, local_parameters, shard_group, split_dimension
from megatron_dppo.training.checkpoint.optimizer_state import optimizer_shards
from megatron_dppo.training.policy.trainable import TrainablePolicy


@dataclass(frozen=True)
class Piece:
    """A rectangle of a whole tensor, as this rank holds it.

    Attributes:
        name: of the whole tensor.
        whole_shape: of the whole tensor.
        offset: where in the whole tensor the rectangle begins.
        values: the rectangle: a view of live memory, for reading into as well as for saving.
        is_saved: False where another rank holds the same numbers but may have cut them differently. (Identical pieces on
            several ranks are fine: one of them is written.)
    """

    name: str
    whole_shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: torch.Tensor
    is_saved: bool


def weight_pieces(model_chunks: Sequence[torch.nn.Module], hf_config: PretrainedConfig) -> Iterator[Piece]:
    """``model.<parameter>``: the weights."""
    for name, parameter in local_parameters(model_chunks):
        yield from _pieces("model", name, parameter, 0, parameter.detach(), hf_config)


def optimizer_pieces(policy: TrainablePolicy, optimizer: MegatronOptimizer) -> Iterator[Piece]:
    """``optimizer.<state>.<parameter>``: fp32 main parameters (of 16-bit weights) and Adam's moments, if there are any."""
    names = {parameter: name for name, parameter in local_parameters(policy.chunks)}
    for shard in optimizer_shards(optimizer):
        for key, values in shard.tensors().items():
            yield from _pieces(
                f"optimizer.{key}", names[shard.parameter], shard.parameter, shard.start, values, policy.hf_config
            )


def random_state_pieces() -> Iterator[Piece]:
    """``random.<rank>.<generator>``: copies of the states of the random generators; see ``set_random_state``."""
    states = {"torch": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for generator, state in states.items():
        yield Piece(f"random.{dist.get_rank()}.{generator}", tuple(state.shape), (0,), state.clone(), is_saved=True)


def set_random_state(pieces: Sequence[Piece]) -> None:
    """Put the generators into the states of ``random_state_pieces``."""
    states = {piece.name.split(".", 2)[2]: piece.values for piece in pieces}
    torch.set_rng_state(states.pop("torch"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    get_cuda_rng_tracker().set_states(states)


def zero_vocabulary_padding(model_chunks: Sequence[torch.nn.Module], hf_config: PretrainedConfig) -> None:
    """Padded vocabulary rows are in no checkpoint; they are zero."""
    for name, parameter in local_parameters(model_chunks):
        if name in (EMBEDDING, OUTPUT_LAYER):
            held = sum(rows for _, _, rows in _row_runs(name, parameter.shape[0], hf_config.vocab_size))
            parameter.detach()[held:].zero_()


def _pieces(
    key: str, name: str, parameter: torch.Tensor, start: int, values: torch.Tensor, hf_config: PretrainedConfig
) -> Iterator[Piece]:
    """The rectangles of ``values``, which is the flattened local parameter from element ``start`` on."""
    shapes = hf_shapes(name, hf_config)
    whole_shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    columns = parameter[0].numel()
    first_column = shard_group(name).rank() * columns if split_dimension(name) == 1 else 0
    flat, end = values.view(-1), start + values.numel()
    for local_row, whole_row, rows in _row_runs(name, parameter.shape[0], whole_shape[0]):
        base = local_row * columns
        low, high = max(start - base, 0), min(end - base, rows * columns)
        for row, column, height, width in _rectangles(low, high, columns):
            begin = base + row * columns + column - start
            offset, shape = (whole_row + row, first_column + column), (height, width)
            yield Piece(
                f"{key}.{name}",
                whole_shape,
                offset[: len(whole_shape)],
                flat[begin : begin + height * width].view(shape[: len(whole_shape)]),
                _is_saved(name),
            )


def _row_runs(name: str, local_rows: int, whole_rows: int) -> Iterator[tuple[int, int, int]]:
    """(first local row, first whole row, count) of each run of neighbouring rows; padded rows are left out."""
    rows = torch.arange(local_rows)
    if split_dimension(name) == 0:
        group = shard_group(name)
        rows = cut_shard(name, torch.arange(local_rows * group.size()), group.size(), group.rank())
    rows = rows[rows < whole_rows]
    breaks = (torch.nonzero(rows.diff() != 1).flatten() + 1).tolist()
    for begin, end in itertools.pairwise([0, *breaks, len(rows)]):
        if end > begin:
            yield begin, int(rows[begin]), end - begin


def _rectangles(low: int, high: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, height, width) of the rectangles that elements [low, high) of a flattened matrix consist of."""
    while low < high:
        row, column = divmod(low, columns)
        if column or high - low < columns:
            height, width = 1, min(columns - column, high - low)
        else:
            height, width = (high - low) // columns, columns
        yield row, column, height, width
        low += height * width


def _is_saved(name: str) -> bool:
    """What is not split is on every rank of the shard group, a tied embedding on the last pipeline stage once more.

    The distributed optimizer cuts each of these copies by itself; the pieces of one of them are saved.
    """
    if name == EMBEDDING and parallel_state.get_pipeline_model_parallel_rank() > 0:
        return False
    return split_dimension(name) is not None or shard_group(name).rank() == 0
