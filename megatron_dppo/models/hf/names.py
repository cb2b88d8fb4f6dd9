"""The map between Megatron's parameters and a Hugging Face checkpoint's tensors, for whole (unsharded) tensors.

Parameters go by the name that core's local layer spec gives them, with layer and expert numbers counted over the whole
model (``decoder.layers.7.mlp.experts.local_experts.12.linear_fc1.weight``). Four kinds of tensor are laid out differently:

* ``linear_qkv``: per KV group, its query heads, then its key head, then its value head;
* ``linear_fc1``: gate rows above up rows;
* vocabulary matrices: rows padded at the end (padding is not part of this map);
* experts: a checkpoint has one tensor per expert and projection (transformers 5 fuses them in memory only).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from transformers import PretrainedConfig

from megatron_dppo.models.hf.config import head_dim, is_moe

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

_OUTSIDE_LAYERS = {
    EMBEDDING: "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    OUTPUT_LAYER: "lm_head.weight",
}
# Order within a layer, as exported.
_IN_ATTENTION = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
}
_IN_MLP = {
    "linear_fc1.weight": ("gate_proj.weight", "up_proj.weight"),
    "linear_fc2.weight": ("down_proj.weight",),
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")


def layer_index(name: str) -> int | None:
    """The layer that a parameter belongs to; None for embeddings, final norm and output layer."""
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None


def expert_index(name: str) -> int | None:
    """The expert that a parameter belongs to, or None."""
    match = _LAYER.fullmatch(name)
    match = _EXPERT.fullmatch(match[2]) if match else None
    return int(match[1]) if match else None


def parameter_names(hf_config: PretrainedConfig) -> Iterator[str]:
    """Every parameter of the whole model, in export order; a tied output layer is not one."""
    yield EMBEDDING
    for layer in range(hf_config.num_hidden_layers):
        for rest in _layer_parameter_names(hf_config):
            yield f"decoder.layers.{layer}.{rest}"
    yield "decoder.final_layernorm.weight"
    if not hf_config.tie_word_embeddings:
        yield OUTPUT_LAYER


def hf_names(name: str) -> tuple[str, ...]:
    """The checkpoint tensors that make up one parameter, in the order in which they are joined."""
    if name in _OUTSIDE_LAYERS:
        return (_OUTSIDE_LAYERS[name],)
    match = _LAYER.fullmatch(name)
    if match:
        layer, rest = match.groups()
        expert = _EXPERT.fullmatch(rest)
        if rest in _IN_ATTENTION:
            return tuple(f"model.layers.{layer}.{hf}" for hf in _IN_ATTENTION[rest])
        if rest == "mlp.router.weight":
            return (f"model.layers.{layer}.mlp.gate.weight",)
        if expert and expert[2] in _IN_MLP:
            return tuple(f"model.layers.{layer}.mlp.experts.{expert[1]}.{hf}" for hf in _IN_MLP[expert[2]])
        if rest.removeprefix("mlp.") in _IN_MLP:
            return tuple(f"model.layers.{layer}.mlp.{hf}" for hf in _IN_MLP[rest.removeprefix("mlp.")])
    raise KeyError(f"the parameter {name} has no counterpart in a Hugging Face checkpoint")


def hf_shapes(name: str, hf_config: PretrainedConfig) -> tuple[tuple[int, ...], ...]:
    """Shapes of ``hf_names(name)``."""
    hidden, dim = hf_config.hidden_size, head_dim(hf_config)
    query, key = hf_config.num_attention_heads * dim, hf_config.num_key_value_heads * dim
    if name in (EMBEDDING, OUTPUT_LAYER):
        return ((hf_config.vocab_size, hidden),)
    if name.endswith("linear_qkv.weight"):
        return ((query, hidden), (key, hidden), (key, hidden))
    if name.endswith("linear_qkv.bias"):
        return ((query,), (key,), (key,))
    if name.endswith("linear_proj.weight"):
        return ((hidden, query),)
    if name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
        return ((dim,),)
    if name.endswith("router.weight"):
        return ((hf_config.num_experts, hidden),)
    ffn = hf_config.intermediate_size if expert_index(name) is None else hf_config.moe_intermediate_size
    if name.endswith("linear_fc1.weight"):
        return ((ffn, hidden), (ffn, hidden))
    if name.endswith("linear_fc2.weight"):
        return ((hidden, ffn),)
    return ((hidden,),)


def from_hf(name: str, tensors: Sequence[torch.Tensor], hf_config: PretrainedConfig) -> torch.Tensor:
    """Join the tensors of ``hf_names(name)`` to the parameter, as it is on one rank without vocabulary padding."""
    if len(tensors) == 3:
        groups = hf_config.num_key_value_heads
        rest = tensors[0].shape[1:]
        per_group = [tensor.reshape(groups, -1, *rest) for tensor in tensors]
        return torch.cat(per_group, dim=1).reshape(-1, *rest)
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def to_hf(name: str, parameter: torch.Tensor, hf_config: PretrainedConfig) -> list[tuple[str, torch.Tensor]]:
    """The inverse of ``from_hf``: contiguous tensors with their checkpoint names. Padded rows are dropped."""
    names = hf_names(name)
    if len(names) == 3:
        groups, dim = hf_config.num_key_value_heads, head_dim(hf_config)
        rest = parameter.shape[1:]
        heads = hf_config.num_attention_heads // groups * dim
        parts = parameter.view(groups, heads + 2 * dim, *rest).split([heads, dim, dim], dim=1)
        return [(hf, part.reshape(-1, *rest)) for hf, part in zip(names, parts, strict=True)]
    if name in (EMBEDDING, OUTPUT_LAYER):
        parameter = parameter[: hf_config.vocab_size]
    return list(zip(names, parameter.chunk(len(names)), strict=True))


def _layer_parameter_names(hf_config: PretrainedConfig) -> Iterator[str]:
    for rest in _IN_ATTENTION:
        if rest.endswith(".bias") and hf_config.model_type != "qwen2":
            continue
        if rest.endswith(("q_layernorm.weight", "k_layernorm.weight")) and "qwen3" not in hf_config.model_type:
            continue
        yield rest
    if not is_moe(hf_config):
        yield from (f"mlp.{rest}" for rest in _IN_MLP)
        return
    yield "mlp.router.weight"
    for expert in range(hf_config.num_experts):
        yield from (f"mlp.experts.local_experts.{expert}.{rest}" for rest in _IN_MLP)
