"""Where SGLang keeps each tensor of a Hugging Face checkpoint: which of its parameters, which part of it, which shard.

SGLang stores q, k and v in one ``qkv_proj``, gate and up in one ``gate_up_proj``, and all experts of a layer in
``w13_weight`` (gate and up of each expert) and ``w2_weight`` (down), each split over its tensor-parallel ranks. Knowing
this layout is what makes it possible to say, before asking the server, what it must hold after a weight update.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

import torch
from transformers import PretrainedConfig

from megatron_dppo.errors import ConfigError, WeightSyncError
from megatron_dppo.models.hf.config import ARCHITECTURES, is_moe

_VOCABULARY_PADDING = 64
_CPU_INTERMEDIATE_PADDING = 32  # per rank

_QKV = re.compile(r"(.+\.self_attn)\.([qkv])_proj\.(weight|bias)")
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_GATE_UP = re.compile(r"(.+\.mlp)\.(gate|up)_proj\.(weight|bias)")
_VOCABULARY = re.compile(r"(model\.embed_tokens|lm_head)\.weight")


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
    """What decides how a tensor is divided over a server's tensor-parallel ranks."""

    NONE = "every rank holds all of it"
    HEADS = "evenly, by attention heads"
    KEY_VALUE_HEADS = "evenly, and shared by neighbouring ranks if there are fewer heads than ranks"
    INTERMEDIATE = "evenly; a CPU server first pads the size with zeros"
    VOCABULARY = "evenly, after padding with zeros"


@dataclass(frozen=True)
class Placement:
    """Part ``part`` of ``parts`` (one after the other, flattened) of ``parameter``; split along ``dim`` of the tensor."""

    parameter: str
    part: int = 0
    parts: int = 1
    split: Split = Split.NONE
    dim: int = 0


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
            return Placement(f"{module}.w2_weight", expert, shape.num_experts, Split.INTERMEDIATE, dim=1)
        part = 2 * expert + (kind == "up")
        return Placement(f"{module}.w13_weight", part, 2 * shape.num_experts, Split.INTERMEDIATE)
    if match := _GATE_UP.fullmatch(hf_name):
        module, kind, suffix = match.groups()
        return Placement(f"{module}.gate_up_proj.{suffix}", int(kind == "up"), 2, Split.INTERMEDIATE)
    if hf_name.endswith(".self_attn.o_proj.weight"):
        return Placement(hf_name, split=Split.HEADS, dim=1)
    if hf_name.endswith(".mlp.down_proj.weight"):
        return Placement(hf_name, split=Split.INTERMEDIATE, dim=1)
    if _VOCABULARY.fullmatch(hf_name):
        return Placement(hf_name, split=Split.VOCABULARY)
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
class ServerRank:
    """One tensor-parallel rank of a server."""

    tp_rank: int
    tp_size: int
    device_type: str  # cpu | cuda


def shard(tensor: torch.Tensor, place: Placement, rank: ServerRank, shape: ModelShape, name: str) -> torch.Tensor:
    """The part of a full tensor that a server's rank holds, contiguous. Raises WeightSyncError if it cannot be divided."""
    size, shards, index = tensor.shape[place.dim], rank.tp_size, rank.tp_rank
    if place.split is Split.NONE:
        return tensor.contiguous()
    if place.split is Split.VOCABULARY:
        size = _round_up(size, _VOCABULARY_PADDING)
        size = size if size % shards == 0 else _round_up(size, _VOCABULARY_PADDING * shards)
    elif place.split is Split.INTERMEDIATE and rank.device_type == "cpu":
        size = _round_up(size, _CPU_INTERMEDIATE_PADDING * shards)
    elif place.split is Split.KEY_VALUE_HEADS and shape.num_key_value_heads < shards and rank.device_type == "cuda":
        shards = shape.num_key_value_heads
        index = rank.tp_rank * shards // rank.tp_size
    if size % shards:
        raise WeightSyncError(f"{name}: {size} cannot be divided by the server's tp_size {rank.tp_size}")
    return _padded_slice(tensor, place.dim, index * (size // shards), size // shards)


def _padded_slice(tensor: torch.Tensor, dim: int, start: int, length: int) -> torch.Tensor:
    """``length`` rows (or columns) from ``start`` on; those beyond the end of the tensor are zero."""
    start = min(start, tensor.shape[dim])
    own = tensor.narrow(dim, start, min(length, tensor.shape[dim] - start))
    if own.shape[dim] == length:
        return own.contiguous()
    padding_shape = list(own.shape)
    padding_shape[dim] = length - own.shape[dim]
    return torch.cat([own, own.new_zeros(padding_shape)], dim)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
