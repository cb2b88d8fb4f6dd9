"""Where SGLang keeps each tensor of a Hugging Face checkpoint: which of its parameters, which part of it, which shard.

SGLang stores q, k and v in one ``qkv_proj``, gate and up in one ``gate_up_proj``, and all experts of a layer in
``w13_weight`` (gate and up of each expert) and ``w2_weight`` (down), each split over its tensor-parallel ranks. Knowing
this layout is what makes it possible to say, before asking the server, what it must hold after a weight update.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dppo.rollout.engine import WeightSyncError

KNOWN_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
_VOCABULARY_PADDING = 64

_QKV = re.compile(r"(.+\.self_attn)\.([qkv])_proj\.(weight|bias)")
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_GATE_UP = re.compile(r"(.+\.mlp)\.(gate|up)_proj\.(weight|bias)")
_ROW_PARALLEL = re.compile(r".+\.(o_proj|down_proj)\.weight")
_VOCABULARY = re.compile(r"(model\.embed_tokens|lm_head)\.weight")


@dataclass(frozen=True)
class ModelShape:
    """The facts of a Hugging Face ``config.json`` that decide the layout."""

    num_key_value_heads: int
    num_experts: int
    tie_word_embeddings: bool

    @classmethod
    def from_folder(cls, model_folder: Path) -> ModelShape:
        """Read ``config.json``. Raises ValueError for a family whose layout is not known here."""
        config = json.loads((model_folder / "config.json").read_text())
        architecture = (config.get("architectures") or ["none"])[0]
        if architecture not in KNOWN_ARCHITECTURES:
            raise ValueError(
                f"{model_folder}: weight updates of {architecture} cannot be verified by checksum (known: "
                f"{', '.join(KNOWN_ARCHITECTURES)}); set rollout.sglang.verify=none to go without"
            )
        return cls(
            num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            num_experts=config.get("num_experts") or config.get("num_local_experts") or 0,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )


@dataclass(frozen=True)
class Placement:
    """Part ``part`` of ``parts`` (stored one after the other, flattened) of the server's parameter ``parameter``."""

    parameter: str
    part: int = 0
    parts: int = 1
    split: str = "none"  # none | rows | columns | key_value_heads | vocabulary


def placement(hf_name: str, shape: ModelShape) -> Placement | None:
    """Where the server keeps the tensor; None if it keeps none because the output layer shares the input embedding."""
    if hf_name == "lm_head.weight" and shape.tie_word_embeddings:
        return None
    if match := _QKV.fullmatch(hf_name):
        module, kind, suffix = match.groups()
        split = "rows" if kind == "q" else "key_value_heads"
        return Placement(f"{module}.qkv_proj.{suffix}", "qkv".index(kind), 3, split)
    if match := _EXPERT.fullmatch(hf_name):
        module, expert, kind = match.group(1), int(match.group(2)), match.group(3)
        if kind == "down":
            return Placement(f"{module}.w2_weight", expert, shape.num_experts, "columns")
        part = 2 * expert + (kind == "up")
        return Placement(f"{module}.w13_weight", part, 2 * shape.num_experts, "rows")
    if match := _GATE_UP.fullmatch(hf_name):
        module, kind, suffix = match.groups()
        return Placement(f"{module}.gate_up_proj.{suffix}", int(kind == "up"), 2, "rows")
    if _ROW_PARALLEL.fullmatch(hf_name):
        return Placement(hf_name, split="columns")
    if _VOCABULARY.fullmatch(hf_name):
        return Placement(hf_name, split="vocabulary")
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


def shard(tensor: torch.Tensor, split: str, tp_rank: int, tp_size: int, shape: ModelShape, name: str) -> torch.Tensor:
    """The part of a full tensor that tensor-parallel rank ``tp_rank`` of ``tp_size`` holds, contiguous."""
    if split == "vocabulary":
        return _vocabulary_shard(tensor, tp_rank, tp_size)
    if tp_size == 1 or split == "none":
        return tensor.contiguous()
    pieces, index, dim = tp_size, tp_rank, 1 if split == "columns" else 0
    if split == "key_value_heads" and shape.num_key_value_heads < tp_size:
        pieces = shape.num_key_value_heads  # fewer heads than ranks: neighbouring ranks hold the same head
        index = tp_rank * pieces // tp_size
    if tensor.shape[dim] % pieces:
        raise WeightSyncError(f"{name}: {tensor.shape[dim]} does not divide by the server's tp_size {tp_size}")
    return tensor.chunk(pieces, dim)[index].contiguous()


def _vocabulary_shard(tensor: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Rows are padded with zeros to a multiple of 64 (times the ranks, if that does not divide), then split evenly."""
    rows = tensor.shape[0]
    multiple = _VOCABULARY_PADDING
    if -(-rows // multiple) * multiple % tp_size:
        multiple *= tp_size
    per_rank = -(-rows // multiple) * multiple // tp_size
    own = tensor[tp_rank * per_rank : (tp_rank + 1) * per_rank]
    padding = own.new_zeros(per_rank - own.shape[0], *own.shape[1:])
    return torch.cat([own, padding]) if padding.numel() else own.contiguous()
