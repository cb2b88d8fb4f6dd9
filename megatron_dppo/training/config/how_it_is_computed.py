"""Whose layers and kernels, what is recomputed, how the optimizer keeps its state: what of that cannot be had."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from megatron_dppo.compat.optional_dependencies import Availability, probe_deep_ep, probe_transformer_engine
from megatron_dppo.errors import ConfigError
from megatron_dppo.models.hf.config import is_moe
from megatron_dppo.models.kernels import choose_kernels
from megatron_dppo.training.config.model_overrides import checked_overrides
from megatron_dppo.training.config.recompute import TRANSFORMER_ENGINE_MODULES
from megatron_dppo.training.config.schema import Config


def check_how_it_is_computed(config: Config, hf_config: PretrainedConfig) -> None:
    """Raise ConfigError for the first of these switches that cannot be had (docs/gpu_switches.md says what each asks for)."""
    model, parallel = config.model, config.parallel
    sees_gpu, device = torch.cuda.is_available(), config.run.device
    if device == "auto":
        device = "cuda" if sees_gpu else "cpu"
    # A configuration for GPUs may be checked where there is none; what their hosts have installed is not known here.
    elsewhere = Availability(True, "not looked for") if device == "cuda" and not sees_gpu else None
    kernels = choose_kernels(model.backend, device, elsewhere, elsewhere)
    stages = parallel.layers_of_stages(hf_config.num_hidden_layers)
    model.recompute.check([layers // parallel.chunks_per_stage for layers in stages], is_moe(hf_config))
    only_there = [module for module in model.recompute.modules if module in TRANSFORMER_ENGINE_MODULES]
    if model.recompute.granularity == "selective" and only_there and not kernels.transformer_engine:
        raise ConfigError(
            f"model.recompute.modules: {', '.join(only_there)} can be recomputed in Transformer Engine's layers only:"
            " set model.backend=te, or choose among core_attn, mlp and moe, or granularity=full"
        )
    checked_overrides(model.overrides, kernels.transformer_engine, is_moe(hf_config))
    if parallel.moe_token_dispatcher == "flex":
        deep_ep = elsewhere or probe_deep_ep()
        if device != "cuda" or model.dtype != "bf16" or not deep_ep.usable:
            reason = (
                deep_ep.reason if device == "cuda" and model.dtype == "bf16" else "its kernels move 16 bits, on GPUs"
            )
            raise ConfigError(f"parallel.moe_token_dispatcher=flex needs DeepEP: {reason}; use alltoall")
    engine = elsewhere or probe_transformer_engine()
    optimizers = [config.train.optimizer] + ([config.warm_start.optimizer] if config.warm_start.steps else [])
    config.train.optimizer_memory.check(
        dtype=model.dtype,
        distributed=parallel.use_distributed_optimizer,
        device=device,
        beta2=max(optimizer.adam_beta2 for optimizer in optimizers),
        transformer_engine=None if engine.usable else engine.reason,
    )
