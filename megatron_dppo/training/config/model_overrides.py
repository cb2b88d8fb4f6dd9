"""``model.overrides``: the few fields of Megatron's TransformerConfig that a run may set by core's own names.

A field is on the list if it changes how fast the same numbers are computed, core 0.16 and 0.19 both have it, and somebody
reads it with the layers that are built here. All others are decided elsewhere, in one place: the architecture by config.json,
the layout by ``parallel``, the rest by options of this package or by what the trainer promises. Whoever sets one of those
is told where.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import megatron.core
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dppo.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What an override may be.

    Attributes:
        kind: of the value, as YAML gives it.
        needs_transformer_engine: whether only Transformer Engine's layers or kernels read it.
        choices: of texts.
    """

    kind: type
    needs_transformer_engine: bool = False
    choices: tuple[str, ...] = ()


ALLOWED: dict[str, Allowed] = {
    # Off, to see whether a fused kernel is what differs.
    "apply_rope_fusion": Allowed(bool, needs_transformer_engine=True),
    "moe_permute_fusion": Allowed(bool, needs_transformer_engine=True),
    "bias_activation_fusion": Allowed(bool),
    "bias_dropout_fusion": Allowed(bool),
    "deterministic_mode": Allowed(bool, needs_transformer_engine=True),
    "attention_backend": Allowed(str, True, ("auto", "flash", "fused", "unfused")),
    "moe_router_fusion": Allowed(bool, needs_transformer_engine=True),
    "moe_deepep_num_sms": Allowed(int),
    "deallocate_pipeline_outputs": Allowed(bool),
    "batch_p2p_sync": Allowed(bool),
}

_LAYOUT = "it is a matter of the layout: set {}"
_SUMS = "gradients are summed over tokens in fp32 and divided once, by the global count: all of the trainer rests on it"
_FP8 = (
    "weights and activations are 16 or 32 bits here: fp8 and fp4 parameters cannot be filled, exported, frozen or sent to"
    " servers by this package"
)
# What somebody may look for, and where it is. Prefixes end in *.
REFUSED: dict[str, str] = {
    "fp8*": _FP8,
    "fp4*": _FP8,
    "moe_single_grouped_weight": "one parameter for all experts has no place in the checkpoint's names: leave it unset",
    "moe_single_grouped_bias": "one parameter for all experts has no place in the checkpoint's names: leave it unset",
    "recompute_*": "set model.recompute",
    "gradient_accumulation_fusion": "model.backend decides: Transformer Engine's layers accumulate by themselves",
    "transformer_impl": "set model.backend",
    "params_dtype": "set model.dtype",
    "bf16": "set model.dtype",
    "fp16": "set model.dtype: fp16 needs a loss scale, which nothing here applies",
    "moe_token_dispatcher_type": "set parallel.moe_token_dispatcher",
    "moe_flex_dispatcher_backend": "set parallel.moe_token_dispatcher",
    "moe_enable_deepep": "set parallel.moe_token_dispatcher=flex",
    "sequence_parallel": _LAYOUT.format("parallel.sequence_parallel"),
    "*_parallel_size": _LAYOUT.format("parallel.*_parallel_size"),
    "num_layers_in_*": _LAYOUT.format("parallel.num_layers_in_*"),
    "calculate_per_token_loss": _SUMS,
    "moe_aux_loss_coeff": "an auxiliary loss would pull the policy from its own objective",
    "moe_z_loss_coeff": "an auxiliary loss would pull the policy from its own objective",
    "moe_router_load_balancing_type": "an auxiliary loss would pull the policy from its own objective",
    "moe_expert_capacity_factor": "tokens would be dropped that servers do not drop",
    "moe_input_jitter_eps": "rollout and training would route differently",
    "*dropout": "rollout and training would compute different log-probs",
    "cuda_graph*": "the trainer's micro-batches differ in shape",
    "enable_cuda_graph": "the trainer's micro-batches differ in shape",
    "cpu_offloading*": "recompute activations instead: model.recompute",
    "overlap_moe_expert_parallel_comm": "its schedule calls the model in parts, and the trainer's loss needs it whole",
    "delay_wgrad_compute": "its schedule calls the model in parts, and the trainer's loss needs it whole",
    "tp_comm_overlap*": "its buffers have one size, and the trainer's micro-batches differ in shape",
}
_BY_CHECKPOINT = "config.json of model.path says what the model is"
_ARCHITECTURE = """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels qk_layernorm
add_qkv_bias add_bias_linear normalization layernorm_epsilon gated_linear_unit activation_func num_moe_experts moe_router_topk
moe_ffn_hidden_size moe_router_pre_softmax multi_latent_attention window_size softmax_scale"""


def checked_overrides(overrides: Mapping[str, Any], uses_transformer_engine: bool, is_moe: bool) -> dict[str, Any]:
    """``overrides`` as core's TransformerConfig takes them.

    Args:
        overrides: field of TransformerConfig -> value.
        uses_transformer_engine: whether the layers are Transformer Engine's (``choose_kernels``).
        is_moe: whether they hold experts.

    Raises:
        ConfigError: a field that is not on the list, with where to set it instead; a value of another kind; one that nothing
            would read here.
    """
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    result = {}
    for name, value in overrides.items():
        key = f"model.overrides.{name}"
        allowed = ALLOWED.get(name)
        if allowed is None:
            raise ConfigError(f"{key} cannot be set: {_why_not(name)}")
        if name not in fields:
            raise ConfigError(f"{key}: megatron-core {megatron.core.__version__} has no such field: remove it")
        if type(value) is not allowed.kind or (allowed.choices and value not in allowed.choices):
            wanted = " | ".join(allowed.choices) or allowed.kind.__name__
            raise ConfigError(f"{key} must be {wanted}, not {value!r}")
        switched_off = value is False
        if allowed.needs_transformer_engine and not uses_transformer_engine and not switched_off:
            raise ConfigError(
                f"{key}={value} is read by Transformer Engine's layers only: set model.backend=te, or remove it"
            )
        if name.startswith("moe_") and not is_moe:
            raise ConfigError(f"{key} is read by MoE layers only, and this policy has none: remove it")
        result[name] = AttnBackend[value] if name == "attention_backend" else value
    return result


def _why_not(name: str) -> str:
    if name in _ARCHITECTURE.split():
        return _BY_CHECKPOINT
    for pattern, reason in REFUSED.items():
        head, star, tail = pattern.partition("*")
        if name == pattern or (star and name.startswith(head) and name.endswith(tail)):
            return reason
    return f"it is not one of {', '.join(sorted(ALLOWED))}"
