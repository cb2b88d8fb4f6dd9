"""Which modules a transformer layer is made of: Transformer Engine's, or core's own with our attention and norms."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dppo.models.attention import SdpaCoreAttention
from megatron_dppo.models.kernels import Kernels


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, with the tag by which core sums its gradient over the sequence-parallel ranks.

    Core's own wrapper around torch's norm refuses sequence parallelism, because it lacks this tag.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def decoder_spec(
    config: TransformerConfig, kernels: Kernels, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layer spec for the GPTModel that is chunk ``vp_stage`` of this rank (None: the only one)."""
    if kernels.transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    submodules = layer.submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = SequenceParallelRMSNorm
    attention = submodules.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    # A block spec, not a layer spec: from a layer spec core would take its own class for the final norm.
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=SequenceParallelRMSNorm
    )
