"""Where SGLang keeps each tensor of a Hugging Face checkpoint: which of its parameters, which part of it, which shard.

SGLang stores q, k and v in one ``qkv_proj``, gate and up in one ``gate_up_proj``, and all experts of a layer in
``w13_weight`` (gate and up of each expert) and ``w2_weight`` (down), each split over its tensor-parallel ranks. Knowing
this layout is what makes it possible to say, before asking the server, what it must hold after a weight update.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from megatron_dppo.errors import ConfigError, WeightSyncError
from megatron_dppo.models.hf.config import ARCHITECTURES, is_moe

_VOCABULARY_PADDING = 64
_CPU_INTERMEDIATE_PADDING = 32  # per rank

_QKV = re.compile(r"(.+\.self_attn)\.([qkv])_proj\.(weight|bias)")
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_GATE_UP = re.compile(r"(.+\.mlp)\.(gate|up)_proj\.(weight|bias)")


@dataclass(frozen=True)
class ModelShape:
    """The facts of a model that decide the layout."""

    num_key_value_heads: int
    num_experts: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, hf_config: PretrainedConfig) -> ModelShape:
        """Raises ConfigError for an architecture whose layout is not known here."""
        architecture = (hf_config.architectures or ["none"])[0]
        if architecture not in ARCHITECTURES.values():
            raise ConfigError(
                f"weight updates of {architecture} cannot be verified by checksum (known: "
                f"{', '.join(ARCHITECTURES.values())}); set rollout.sglang.verify=none to go without"
            )
        return cls(
            num_key_value_heads=hf_config.num_key_value_heads,
            num_experts=hf_config.num_experts if is_moe(hf_config) else 0,
            tie_word_embeddings=hf_config.tie_word_embeddings,
        )


class Split(Enum):
    """What decides how a tensor is divided over a server's ranks."""

    NONE = "every rank holds all of it"
    HEADS = "evenly, by attention heads, over the ranks that share a layer's attention"
    KEY_VALUE_HEADS = "likewise, and shared by neighbouring ranks if there are fewer heads than ranks"
    INTERMEDIATE = "evenly; a CPU server first pads the size with zeros"
    EXPERT = "likewise, over the ranks that share the expert"
    EMBEDDING = "evenly, after padding with zeros, over the ranks that share a layer's attention"
    LM_HEAD = "evenly, after padding with zeros"


@dataclass(frozen=True)
class Placement:
    """Part ``part`` of ``parts`` (one after the other, flattened) of ``parameter``; split along ``dim`` of the tensor."""

    parameter: str
    part: int = 0
    parts: int = 1
    split: Split = Split.NONE
    dim: int = 0


_VOCABULARY = {"model.embed_tokens.weight": Split.EMBEDDING, "lm_head.weight": Split.LM_HEAD}


def placement(hf_name: str, shape: ModelShape) -> Placement | None:
    """Where the server keeps the tensor; None if it keeps none because the output layer shares the input embedding."""
    if hf_name == "lm_head.weight" and shape.tie_word_embeddings:
        return None
    if match := _QKV.fullmatch(hf_name):
        module, kind, suffix = match.groups()
        split = Split.HEADS if kind == "q" else Split.KEY_VALUE_HEADS
        return Placement(f"{module}.qkv_proj.{suffix}", "qkv".index(kind), 3, split)
    if match := _EXPERT.fullmatch(hf_name):
        module, expert, kind = match.group(1), int(match.group(2)), match.group(3)
        if kind == "down":
            return Placement(f"{module}.w2_weight", expert, shape.num_experts, Split.EXPERT, dim=1)
        part = 2 * expert + (kind == "up")
        return Placement(f"{module}.w13_weight", part, 2 * shape.num_experts, Split.EXPERT)
    if match := _GATE_UP.fullmatch(hf_name):
        module, kind, suffix = match.groups()
        return Placement(f"{module}.gate_up_proj.{suffix}", int(kind == "up"), 2, Split.INTERMEDIATE)
    if hf_name.endswith(".self_attn.o_proj.weight"):
        return Placement(hf_name, split=Split.HEADS, dim=1)
    if hf_name.endswith(".mlp.down_proj.weight"):
        return Placement(hf_name, split=Split.INTERMEDIATE, dim=1)
    if hf_name in _VOCABULARY:
        return Placement(hf_name, split=_VOCABULARY[hf_name])
    return Placement(hf_name)


def part_name(parameter: str, part: int) -> str:
    """The Hugging Face name of one part: the inverse of ``placement``, for error messages."""
    for fused, names in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        if f".{fused}." in parameter:
            return parameter.replace(fused, names[part])
    if parameter.endswith(".w13_weight"):
        kind = ("gate_proj", "up_proj")[part % 2]
        return parameter.replace("w13_weight", f"{part // 2}.{kind}.weight")
    if parameter.endswith(".w2_weight"):
        return parameter.replace("w2_weight", f"{part}.down_proj.weight")
    return parameter


@dataclass(frozen=True)
class ServerLayout:
    """How a server divides the model among its ranks.

    Attributes:
        tp_size: its ranks.
        device_type: cpu | cuda: they pad differently.
        ep_size: groups of ranks with experts of their own; each expert is split over the ranks of its group.
        attention_tp_size: ranks that share the attention of one layer and the embedding. With DP attention they are fewer
            than all, and there are several such groups, each with a copy.
        lm_head_tp_size: ranks that share the output layer.
    """

    tp_size: int
    device_type: str
    ep_size: int
    attention_tp_size: int
    lm_head_tp_size: int

    def ranks_with_own_parts(self, split: Split) -> int:
        """How many ranks have to be looked at: with one, all hold the same."""
        return 1 if split is Split.NONE else self.tp_size

    def holds(self, rank: int, place: Placement) -> bool:
        """Whether a rank has something of a part of a parameter: of an expert, only those of its group."""
        group = rank // (self.tp_size // self.ep_size)
        return place.split is not Split.EXPERT or place.part * self.ep_size // place.parts == group


class Cut(NamedTuple):
    """The part of a matrix that a rank holds. Rows and columns beyond the end of the matrix are zero."""

    first_row: int
    first_column: int
    rows: int
    columns: int

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """What there is of it in ``matrix`` (a vector is one row): a view, smaller than the cut where that has padding."""
        matrix = matrix if matrix.dim() == 2 else matrix.reshape(1, -1)
        return matrix[self.first_row : self.first_row + self.rows, self.first_column : self.first_column + self.columns]


def cut(
    hf_name: str, tensor_shape: Sequence[int], place: Placement, rank: int, layout: ServerLayout, shape: ModelShape
) -> Cut:
    """The part of a tensor that a server's rank holds. Raises WeightSyncError if it cannot be divided."""
    size, shards = tensor_shape[place.dim], _shards(place.split, layout)
    index = rank % shards
    if place.split in (Split.EMBEDDING, Split.LM_HEAD):
        size = _round_up(size, _VOCABULARY_PADDING)
        size = size if size % shards == 0 else _round_up(size, _VOCABULARY_PADDING * shards)
    elif place.split in (Split.INTERMEDIATE, Split.EXPERT) and layout.device_type == "cpu":
        size = _round_up(size, _CPU_INTERMEDIATE_PADDING * shards)
    elif place.split is Split.KEY_VALUE_HEADS and shape.num_key_value_heads < shards and layout.device_type == "cuda":
        index = index * shape.num_key_value_heads // shards
        shards = shape.num_key_value_heads
    if size % shards:
        raise WeightSyncError(f"{hf_name}: {size} cannot be divided by {shards}, as the server's {layout} asks")
    length = size // shards
    if len(tensor_shape) == 1:
        return Cut(0, index * length, 1, length)
    rows, columns = tensor_shape
    if place.dim == 0:
        return Cut(index * length, 0, length, columns)
    return Cut(0, index * length, rows, length)


def _shards(split: Split, layout: ServerLayout) -> int:
    return {
        Split.NONE: 1,
        Split.HEADS: layout.attention_tp_size,
        Split.KEY_VALUE_HEADS: layout.attention_tp_size,
        Split.EMBEDDING: layout.attention_tp_size,
        Split.LM_HEAD: layout.lm_head_tp_size,
        Split.INTERMEDIATE: layout.tp_size,
        Split.EXPERT: layout.tp_size // layout.ep_size,
    }[split]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
