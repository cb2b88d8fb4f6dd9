"""From a Hugging Face config to what Megatron-core needs, and everything that cannot be built refused beforehand.

Supported: Llama (SmolLM2 and others of that type too), Qwen2, Qwen3, Qwen3-MoE. A field of a config that would change
the model's numbers but that the Megatron model cannot express is an error here, never dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig, PretrainedConfig

from megatron_dppo.compat.optional_dependencies import probe_transformer_engine, probe_weight_gradient_fusion
from megatron_dppo.distributed.layout import ParallelConfig
from megatron_dppo.errors import ConfigError
from megatron_dppo.models.hf.config_json import read_config_json, rope_parameters

# The supported families: model_type -> the architecture that config.json names.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

# Core has these three of Llama 3's rope scaling built in and takes only the factor (RotaryEmbedding._apply_scaling).
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def load_hf_config(path_or_mapping: str | Path | Mapping[str, Any]) -> PretrainedConfig:
    """Read a model's config from a local folder with config.json, or from its fields. Never uses the network.

    Raises ConfigError if there is no config or the model is not one that can be built.
    """
    if isinstance(path_or_mapping, Mapping):
        fields, source = copy.deepcopy(dict(path_or_mapping)), "the given config"  # transformers writes into it
    else:
        fields, source = read_config_json(path_or_mapping), str(Path(path_or_mapping) / "config.json")
    model_type = fields.pop("model_type", None)
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"{source}: model_type {model_type!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    _refuse_what_is_left_open(fields, model_type, source)
    try:
        hf_config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # transformers has validation errors of its own, which are no ValueErrors
        raise ConfigError(f"{source} is not a valid {model_type} config: {error}") from error
    _refuse_inexpressible(hf_config)
    return hf_config


def decisive_fields(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Everything that decides which tensors a policy has and what it computes with them; equal for two of one model."""
    names = [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "tie_word_embeddings",
        "hidden_act",
        "rms_norm_eps",
    ]
    if is_moe(hf_config):
        names += [*_MOE_SIZES, "norm_topk_prob"]
    rope = {name: value for name, value in rope_parameters(hf_config).items() if name != "type"}
    return {**{name: getattr(hf_config, name) for name in names}, "head_dim": head_dim(hf_config), **rope}


def is_moe(hf_config: PretrainedConfig) -> bool:
    """True if the model's layers are mixtures of experts."""
    return bool(hf_config.model_type == "qwen3_moe")


def head_dim(hf_config: PretrainedConfig) -> int:
    """Size of one attention head."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def check_policy_fits(hf_config: PretrainedConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Raise ConfigError, naming field, value and remedy, if the model cannot be laid out like this.

    Needs neither torch.distributed nor a model, so a launcher can call it on a login node.
    """
    _refuse_inexpressible(hf_config)
    parallel.check_world_size(world_size)
    tensor, pipeline = "tensor_model_parallel_size", "pipeline_model_parallel_size"
    _check_divides(hf_config, "num_attention_heads", parallel, tensor)
    # Newer versions of core can repeat KV heads over TP ranks; an export would then send the copies as heads.
    _check_divides(hf_config, "num_key_value_heads", parallel, tensor)
    _check_divides(hf_config, "num_hidden_layers", parallel, pipeline)
    chunks = parallel.pipeline_model_parallel_size * parallel.chunks_per_stage
    if hf_config.num_hidden_layers % chunks:
        raise ConfigError(
            f"num_hidden_layers={hf_config.num_hidden_layers} is not divisible by pipeline_model_parallel_size="
            f"{parallel.pipeline_model_parallel_size} x virtual_pipeline_model_parallel_size={parallel.chunks_per_stage} = "
            f"{chunks}: choose chunks that divide the layers"
        )
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
    hf_config: PretrainedConfig, parallel: ParallelConfig, dtype: torch.dtype, **overrides: Any
) -> TransformerConfig:
    """The TransformerConfig of this model in this layout.

    ``overrides`` replaces any of its fields, e.g. activation recomputation or ``moe_enable_routing_replay``. Losses are
    per token (``calculate_per_token_loss``): gradients are summed over tokens and divided once, by the global count.

    Raises ConfigError for an override that would fail later on (core's own checks raise that or AssertionError).
    """
    fields: dict[str, Any] = {
        **_architecture_fields(hf_config),
        **_parallel_fields(parallel, dtype),
        **_kernel_fields(),
    }
    if is_moe(hf_config):
        fields.update(_moe_fields(hf_config, parallel))
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
    rope = rope_parameters(hf_config)
    arguments: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": rope["rope_theta"]}
    if rope["rope_type"] == "llama3":
        arguments.update(rope_scaling=True, rope_scaling_factor=rope["factor"])
    return arguments


def _architecture_fields(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "ffn_hidden_size": hf_config.intermediate_size,
        "num_attention_heads": hf_config.num_attention_heads,
        "num_query_groups": hf_config.num_key_value_heads,
        "kv_channels": head_dim(hf_config),
        "qk_layernorm": hf_config.model_type in ("qwen3", "qwen3_moe"),
        "add_qkv_bias": hf_config.model_type == "qwen2",
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf_config.rms_norm_eps,
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


def _kernel_fields() -> dict[str, Any]:
    """Fused kernels are CUDA kernels, or compiled: on a CPU they are either missing or not worth their compile time."""
    on_cuda = torch.cuda.is_available()
    return {
        # Weights are loaded or initialised after building: see build_policy.
        "perform_initialization": False,
        "use_cpu_initialization": not on_cuda,
        "bias_activation_fusion": on_cuda,
        "bias_dropout_fusion": on_cuda,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": on_cuda and probe_weight_gradient_fusion().usable,
    }


def _moe_fields(hf_config: PretrainedConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Dropless top-k routing with no auxiliary loss, which would pull the policy from its own objective."""
    return {
        "num_moe_experts": hf_config.num_experts,
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        # HF: softmax over all experts, top-k, then (norm_topk_prob) divide by the sum of the k. Core with pre_softmax
        # is the former without the division; without, a softmax over the k chosen logits, which equals the division.
        "moe_router_pre_softmax": not hf_config.norm_topk_prob,
        "moe_permute_fusion": False,
    }


# The sizes of a model. transformers fills in those of its first member (Llama 7B, say) where config.json names none.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_MOE_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


def _refuse_what_is_left_open(fields: Mapping[str, Any], model_type: str, source: str) -> None:
    """A class's default is no fact about the model at hand, and quantised weights are none that could be trained."""
    needed = [*_SIZES]
    if model_type != "llama":  # whose class takes as many as there are heads
        needed.append("num_key_value_heads")
    if model_type == "qwen3_moe":
        needed += _MOE_SIZES
    missing = [name for name in needed if fields.get(name) is None]
    if "num_experts" in missing and fields.get("num_local_experts") is not None:  # another name of it in transformers
        missing.remove("num_experts")
    if missing:
        raise ConfigError(f"{source} does not say {', '.join(missing)}: a default would be another model's")
    if fields.get("quantization_config") is not None:
        raise ConfigError(
            f"{source} has a quantization_config: quantised weights cannot be trained; use the checkpoint in bf16"
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
