"""From a Hugging Face config to what Megatron-core needs, and everything that cannot be built refused beforehand.

Supported: Llama (SmolLM2 and others of that type too), Qwen2, Qwen3, Qwen3-MoE. A field of a config that would change
the model's numbers but that the Megatron model cannot express is an error here, never dropped.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from megatron_dppo.compat.optional_dependencies import probe_transformer_engine
from megatron_dppo.distributed.parallel_config import ParallelConfig
from megatron_dppo.errors import ConfigError
from megatron_dppo.models.hf.config_json import (
    fields_for_every_reader,
    keep_left_out_fields,
    read_config_json,
    rope_parameters,
)
from megatron_dppo.models.kernels import Kernels

# The supported families: model_type -> the architecture that config.json names.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

# Core has these three of Llama 3's rope scaling built in and takes only the factor (RotaryEmbedding._apply_scaling).
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Where a config.json does not name these, transformers takes those of one published model of the family, which are facts
# of that model only. Other defaults (rope_theta, rms_norm_eps, tie_word_embeddings) all readers and versions agree on.
_SIZES: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_FURTHER_SIZES = ("intermediate_size", "num_key_value_heads")
_FURTHER_SIZES_OF_FAMILY = {
    "llama": ("intermediate_size",),  # without num_key_value_heads every head has its own, as in the first Llamas
    "qwen3": (*_FURTHER_SIZES, "head_dim"),
    "qwen3_moe": ("num_key_value_heads", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
}
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Fields under which the weights are something else than the tensors of this folder's safetensors files.
_OTHER_WEIGHTS = {
    "quantization_config": "the weights are quantised, which is not supported: give the folder of the model in bf16",
    "compression_config": "the weights are compressed, which is not supported: give the folder of the model in bf16",
    "transformers_weights": "the weights are in a file of another name: call it model.safetensors and remove the field",
    "per_layer_config": "layers that differ from each other are not supported",
}


def load_hf_config(path_or_mapping: str | Path | Mapping[str, Any]) -> PretrainedConfig:
    """Read a model's config from a local folder with config.json, or from its fields. Never uses the network.

    What the fields do not name is what every reader of such a config takes for it; special tokens that they do not name are
    None, whatever the family's first model had.

    Raises ConfigError if there is no config, the model is not one that can be built, or the fields leave open which it is.
    """
    if isinstance(path_or_mapping, Mapping):
        fields, source = copy.deepcopy(dict(path_or_mapping)), "the given config"
        required = _SIZES
    else:
        folder = Path(path_or_mapping)
        fields, source = read_config_json(folder), str(folder / "config.json")
        required = (*_SIZES, "max_position_embeddings")  # how long a sequence may be is read from a folder only
        _refuse_adapter(folder)
    model_type = fields.pop("model_type", None)
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"{source}: model_type {model_type!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    aliases = CONFIG_MAPPING[model_type].attribute_map
    _refuse_other_weights(fields, source)
    _refuse_contradictions(fields, aliases, source)
    _refuse_missing(
        (*required, *_FURTHER_SIZES_OF_FAMILY.get(model_type, _FURTHER_SIZES)),
        fields,
        aliases,
        f"{source} ({model_type})",
    )
    try:
        hf_config = AutoConfig.for_model(model_type, **{**dict.fromkeys(_SPECIAL_TOKENS), **copy.deepcopy(fields)})
    except Exception as error:  # transformers has validation errors of its own, which are no ValueErrors
        raise ConfigError(f"{source} is not a valid {model_type} config: {error}") from error
    hf_config.architectures = hf_config.architectures or [ARCHITECTURES[model_type]]
    keep_left_out_fields(hf_config, fields)
    _refuse_inexpressible(hf_config)
    return hf_config


def rewrite_for_every_reader(folder: str | Path) -> None:
    """Give the renamed fields of a config.json that transformers 5 wrote their old names as well."""
    written = fields_for_every_reader(load_hf_config(folder), read_config_json(folder)["dtype"])
    (Path(folder) / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def is_moe(hf_config: PretrainedConfig) -> bool:
    """True if the model's layers are mixtures of experts."""
    return bool(hf_config.model_type == "qwen3_moe")


def head_dim(hf_config: PretrainedConfig) -> int:
    """Size of one attention head."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def architecture(hf_config: PretrainedConfig) -> dict[str, Any]:
    """The fields that decide which parameters there are and what is computed with them, under Hugging Face's names.

    Two configs with equal architectures are the same model, whichever version of transformers wrote them. The Megatron model
    is built from these fields, so that one which is read there is compared here.
    """
    rope = rope_parameters(hf_config)
    fields = {
        "model_type": hf_config.model_type,
        "vocab_size": hf_config.vocab_size,
        "hidden_size": hf_config.hidden_size,
        "intermediate_size": hf_config.intermediate_size,
        "num_hidden_layers": hf_config.num_hidden_layers,
        "num_attention_heads": hf_config.num_attention_heads,
        "num_key_value_heads": hf_config.num_key_value_heads,
        "head_dim": head_dim(hf_config),
        "rms_norm_eps": hf_config.rms_norm_eps,
        "tie_word_embeddings": hf_config.tie_word_embeddings,
        "rope_type": rope["rope_type"],
        "rope_theta": rope["rope_theta"],
    }
    if rope["rope_type"] == "llama3":
        fields["rope_scaling.factor"] = rope["factor"]
    if is_moe(hf_config):
        fields |= {
            "num_experts": hf_config.num_experts,
            "num_experts_per_tok": hf_config.num_experts_per_tok,
            "moe_intermediate_size": hf_config.moe_intermediate_size,
            "norm_topk_prob": hf_config.norm_topk_prob,
        }
    return fields


def check_policy_fits(hf_config: PretrainedConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Raise ConfigError, naming field, value and remedy, if the model cannot be laid out like this.

    Needs neither torch.distributed nor a model, so a launcher can call it on a login node.
    """
    _refuse_inexpressible(hf_config)
    parallel.check_world_size(world_size)
    tensor = "tensor_model_parallel_size"
    _check_divides(hf_config, "num_attention_heads", parallel, tensor)
    # Newer versions of core can repeat KV heads over TP ranks; an export would then send the copies as heads.
    _check_divides(hf_config, "num_key_value_heads", parallel, tensor)
    parallel.layers_of_stages(hf_config.num_hidden_layers)
    if not is_moe(hf_config):
        _check_divides(hf_config, "intermediate_size", parallel, tensor)
        if parallel.expert_model_parallel_size > 1:
            raise ConfigError(
                f"expert_model_parallel_size={parallel.expert_model_parallel_size}, but a {hf_config.model_type} model "
                f"has no experts: set it to 1"
            )
        return
    _check_divides(hf_config, "num_experts", parallel, "expert_model_parallel_size")
    expert_tensor_size = parallel.expert_tensor_size
    if hf_config.moe_intermediate_size % expert_tensor_size:
        raise ConfigError(
            f"moe_intermediate_size={hf_config.moe_intermediate_size} is not divisible by "
            f"expert_tensor_parallel_size={expert_tensor_size}: choose one that divides it, e.g. 1"
        )
    if parallel.expert_model_parallel_size == 1 and expert_tensor_size != parallel.tensor_model_parallel_size:
        raise ConfigError(
            f"expert_tensor_parallel_size={expert_tensor_size} with "
            f"tensor_model_parallel_size={parallel.tensor_model_parallel_size} and no expert parallelism: Megatron-core "
            "would not sum the experts' gradients over the tensor-parallel ranks; leave expert_tensor_parallel_size unset"
        )
    if parallel.tensor_model_parallel_size > 1 and not parallel.uses_sequence_parallel:
        raise ConfigError(
            f"sequence_parallel=False with tensor_model_parallel_size={parallel.tensor_model_parallel_size} cannot train "
            f"an MoE model (every TP rank would route every token): leave sequence_parallel None"
        )


def to_transformer_config(
    hf_config: PretrainedConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    kernels: Kernels,
    **overrides: Any,
) -> TransformerConfig:
    """The TransformerConfig of this model in this layout, with these kernels.

    ``overrides`` replaces any of its fields, e.g. activation recomputation or ``moe_enable_routing_replay``. Losses are
    per token (``calculate_per_token_loss``): gradients are summed over tokens and divided once, by the global count.

    Raises ConfigError for an override that would fail later on (core's own checks raise that or AssertionError).
    """
    fields: dict[str, Any] = {
        **_architecture_fields(hf_config),
        **_parallel_fields(parallel, dtype),
        **_kernel_fields(kernels),
    }
    if is_moe(hf_config):
        fields.update(_moe_fields(hf_config, parallel, kernels))
    config = TransformerConfig(**{**fields, **overrides})
    _refuse_recompute_without_transformer_engine(config)
    return config


def _refuse_recompute_without_transformer_engine(config: TransformerConfig) -> None:
    """Core recomputes norms by a function that reads Transformer Engine's fp8 state, needed or not: a NameError without."""
    if config.recompute_granularity != "selective" or "layernorm" not in config.recompute_modules:
        return
    if not (engine := probe_transformer_engine()).usable:
        raise ConfigError(
            f"recompute_modules={config.recompute_modules}: 'layernorm' needs Transformer Engine ({engine.reason}); "
            "choose among core_attn, mlp and moe, or recompute_granularity='full'"
        )


def rotary_arguments(hf_config: PretrainedConfig) -> dict[str, Any]:
    """What GPTModel takes for the position embedding, from transformers 5's ``rope_parameters`` or the older fields."""
    fields = architecture(hf_config)
    arguments: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": fields["rope_theta"]}
    if fields["rope_type"] == "llama3":
        arguments.update(rope_scaling=True, rope_scaling_factor=fields["rope_scaling.factor"])
    return arguments


def _architecture_fields(hf_config: PretrainedConfig) -> dict[str, Any]:
    fields = architecture(hf_config)
    return {
        "num_layers": fields["num_hidden_layers"],
        "hidden_size": fields["hidden_size"],
        "ffn_hidden_size": fields["intermediate_size"],
        "num_attention_heads": fields["num_attention_heads"],
        "num_query_groups": fields["num_key_value_heads"],
        "kv_channels": fields["head_dim"],
        "qk_layernorm": fields["model_type"] in ("qwen3", "qwen3_moe"),
        "add_qkv_bias": fields["model_type"] == "qwen2",
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": fields["rms_norm_eps"],
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": hf_config.initializer_range,
    }


def _parallel_fields(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
        "virtual_pipeline_model_parallel_size": parallel.chunks_per_stage if parallel.chunks_per_stage > 1 else None,
        # Interleaved, a stage sends forward and backward at once. Batched, as core does it unless told otherwise, these would
        # be taken for each other on two stages, where both neighbours are the same rank.
        "overlap_p2p_comm": parallel.chunks_per_stage > 1,
        "batch_p2p_comm": parallel.chunks_per_stage == 1,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "sequence_parallel": parallel.uses_sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "calculate_per_token_loss": True,
    }


def _kernel_fields(kernels: Kernels) -> dict[str, Any]:
    """Fused kernels are CUDA kernels, or compiled: on a CPU they are either missing or not worth their compile time."""
    return {
        # Weights are loaded or initialised after building: see build_policy.
        "perform_initialization": False,
        # Without it core names the CUDA device in every allocation; with it, torch's default device counts.
        "use_cpu_initialization": not kernels.on_cuda,
        "bias_activation_fusion": kernels.on_cuda,
        "bias_dropout_fusion": kernels.on_cuda,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": kernels.rope_fusion,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": kernels.core_weight_gradient_fusion,
    }


def _moe_fields(hf_config: PretrainedConfig, parallel: ParallelConfig, kernels: Kernels) -> dict[str, Any]:
    """Dropless top-k routing with no auxiliary loss, which would pull the policy from its own objective."""
    fields = architecture(hf_config)
    return {
        "num_moe_experts": fields["num_experts"],
        "moe_router_topk": fields["num_experts_per_tok"],
        "moe_ffn_hidden_size": fields["moe_intermediate_size"],
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher,
        "moe_flex_dispatcher_backend": "deepep",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        # HF: softmax over all experts, top-k, then (norm_topk_prob) divide by the sum of the k. Core with pre_softmax
        # is the former without the division; without, a softmax over the k chosen logits, which equals the division.
        "moe_router_pre_softmax": not fields["norm_topk_prob"],
        "moe_permute_fusion": kernels.permute_fusion,
        "moe_grouped_gemm": kernels.transformer_engine,
    }


def _refuse_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} holds an adapter (adapter_config.json), which is not supported: merge it into the weights (peft's"
            " merge_and_unload) and give that folder"
        )


def _refuse_other_weights(fields: Mapping[str, Any], source: str) -> None:
    for name, reason in _OTHER_WEIGHTS.items():
        if fields.get(name):
            raise ConfigError(f"{source} has {name}: {reason}")


def _refuse_contradictions(fields: Mapping[str, Any], aliases: Mapping[str, str], source: str) -> None:
    """A field under its old and its new name: readers differ in which of the two they take."""
    for old, new in aliases.items():
        if old in fields and new in fields and fields[old] != fields[new]:
            raise ConfigError(f"{source}: {old}={fields[old]}, but {new}={fields[new]}: make them equal, or remove one")
    names = [name for name in ("rope_parameters", "rope_scaling") if isinstance(fields.get(name, 0), dict | None)]
    ropes = [dict(fields[name] or {}) for name in names]
    thetas = {rope.pop("rope_theta", None) for rope in ropes} | {fields.get("rope_theta")}
    if len(thetas - {None}) > 1:
        raise ConfigError(
            f"{source}: {', '.join(f'{name}={fields[name]}' for name in ('rope_theta', *names) if name in fields)}: make"
            " them say the same rope_theta, or remove all but one"
        )
    for name, rope in zip(names, ropes, strict=True):
        kind = rope.pop("type", None)
        if rope.setdefault("rope_type", kind or "default") != (kind or rope["rope_type"]):
            raise ConfigError(f"{source}: {name}={fields[name]}: make type and rope_type equal, or remove one")
    scaled = any(rope["rope_type"] != "default" for rope in ropes)
    if len(ropes) == 2 and fields["rope_parameters"] is not None and scaled and ropes[0] != ropes[1]:
        raise ConfigError(
            f"{source}: rope_parameters={fields['rope_parameters']}, but rope_scaling={fields['rope_scaling']}: make them"
            " equal, or remove one"
        )


def _refuse_missing(
    required: Sequence[str], fields: Mapping[str, Any], aliases: Mapping[str, str], source: str
) -> None:
    missing = [name for name in required if name not in fields and aliases.get(name, name) not in fields]
    if missing:
        raise ConfigError(
            f"{source} does not name {', '.join(missing)}, for which there is no value that fits all models: take the"
            " config.json that belongs to the weights"
        )


def _refuse_inexpressible(hf_config: PretrainedConfig) -> None:
    """Everything that would silently give other numbers than the Hugging Face model."""
    kind = hf_config.model_type
    if kind not in ARCHITECTURES:
        raise ConfigError(f"model_type {kind!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    if getattr(hf_config, "use_sliding_window", False) or (
        kind == "llama" and getattr(hf_config, "sliding_window", None)
    ):
        raise ConfigError(
            f"{kind} with sliding-window attention is not supported: attention is over the whole sequence"
        )
    if any(layer != "full_attention" for layer in getattr(hf_config, "layer_types", None) or ()):
        raise ConfigError(f"layer_types={hf_config.layer_types}: only full_attention layers are supported")
    if hf_config.hidden_act != "silu":
        raise ConfigError(f"hidden_act={hf_config.hidden_act!r} is not supported: only 'silu' is")
    for bias in ("attention_bias", "mlp_bias"):
        if getattr(hf_config, bias, False):
            raise ConfigError(f"{kind} with {bias}=True is not supported (Qwen2's query, key and value biases are)")
    if getattr(hf_config, "attention_dropout", 0.0):
        raise ConfigError(
            f"attention_dropout={hf_config.attention_dropout} would make training and rollout log-probs differ: set it to 0"
        )
    _refuse_rope(rope_parameters(hf_config))
    if is_moe(hf_config):
        _refuse_moe(hf_config)


def _refuse_rope(rope: Mapping[str, Any]) -> None:
    if rope["rope_type"] not in ("default", "llama3"):
        raise ConfigError(f"rope_type {rope['rope_type']!r} is not supported: only 'default' and 'llama3' are")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported: only 1.0 is")
    if rope["rope_type"] == "llama3":
        for field, built_in in _LLAMA3_ROPE.items():
            if rope[field] != built_in:
                raise ConfigError(
                    f"llama3 rope with {field}={rope[field]} is not supported: Megatron-core has {built_in}"
                )


def _refuse_moe(hf_config: PretrainedConfig) -> None:
    if hf_config.mlp_only_layers or hf_config.decoder_sparse_step != 1:
        raise ConfigError(
            f"mlp_only_layers={hf_config.mlp_only_layers}, decoder_sparse_step={hf_config.decoder_sparse_step}: "
            f"only models in which every layer has experts are supported ([] and 1)"
        )
    if hf_config.num_experts_per_tok == 1 and hf_config.norm_topk_prob:
        raise ConfigError("num_experts_per_tok=1 with norm_topk_prob=True gives every expert weight 1: set it to False")


def _check_divides(hf_config: PretrainedConfig, field: str, parallel: ParallelConfig, size_field: str) -> None:
    value, size = getattr(hf_config, field), getattr(parallel, size_field)
    if value % size:
        divisors = ", ".join(str(n) for n in range(1, min(value, 64) + 1) if value % n == 0)
        raise ConfigError(f"{field}={value} is not divisible by {size_field}={size}: choose one of {divisors}")
