"""Building the policy: the one place that knows which Megatron model class it is, and how it starts out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megatron_dppo.compat.megatron_on_cpu import enable_megatron_on_cpu
from megatron_dppo.compat.optional_dependencies import define_names_core_lacks_without_transformer_engine
from megatron_dppo.distributed.parallel_config import ParallelConfig
from megatron_dppo.models.hf.config import check_policy_fits, rotary_arguments, to_transformer_config
from megatron_dppo.models.hf.names import EMBEDDING, OUTPUT_LAYER, from_hf, hf_shapes
from megatron_dppo.models.kernels import Kernels, choose_kernels
from megatron_dppo.models.layer_spec import decoder_spec
from megatron_dppo.models.sharding import cut_shard, local_parameters, mark_split_parameters, shard_group, unwrapped

# Vocabulary rows per rank are a multiple of this, so that the largest matrix of all suits the tensor cores.
_VOCAB_ROWS_MULTIPLE = 128


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding and output matrices over all TP ranks. The rows from ``vocab_size`` on are zero."""
    multiple = _VOCAB_ROWS_MULTIPLE * tensor_model_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def build_policy(
    hf_config: PretrainedConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    *,
    fp32_head: bool = False,
    backend: str = "auto",
    **transformer_config_overrides: Any,
) -> list[GPTModel]:
    """Build this rank's part of the policy: one GPTModel per local pipeline chunk, in the order of their layers.

    With PP stages of VPP chunks each, chunk v of stage p is run ``v PP + p`` of the PP VPP equal runs of layers. The first
    chunk of the first stage embeds tokens (``pre_process``); the last chunk of the last stage returns this rank's logits
    [b, s, padded vocabulary / TP] (``post_process``). Each chunk carries ``hf_config``, from which weights are
    exported, and ``fp32_head`` as attributes. ``initialize_model_parallel`` must have been called with the same layout.

    **Every parameter is NaN** until ``load_hf_weights`` or ``initialize_randomly`` has set it, so that a weight that
    nobody set cannot go unnoticed. ``device="meta"`` allocates nothing (parameter counts, capacity planning).

    Args:
        hf_config: from ``load_hf_config``.
        parallel: the layout.
        dtype: of all parameters.
        device: default: the current CUDA device, or the CPU if there is none.
        fp32_head: whoever applies the output layer (``PolicyHead``) makes fp32 logits of 16-bit hidden states. Nothing about
            the model itself changes: its own forward gives logits in ``dtype``.
        backend: whose layers: te (Transformer Engine) | local | auto: te on a GPU, local elsewhere (``choose_kernels``).
        transformer_config_overrides: fields of Megatron's TransformerConfig, e.g. ``recompute_granularity="full"``.

    Raises:
        ConfigError: the model cannot be laid out like this (see ``check_policy_fits``); Transformer Engine cannot be used.
    """
    enable_megatron_on_cpu()
    define_names_core_lacks_without_transformer_engine()
    check_policy_fits(hf_config, parallel, torch.distributed.get_world_size())
    target = torch.device(device if device is not None else _default_device())
    kernels = choose_kernels(backend, target.type)
    config = to_transformer_config(hf_config, parallel, dtype, kernels, **transformer_config_overrides)
    virtual_stages = range(parallel.chunks_per_stage) if parallel.chunks_per_stage > 1 else [None]
    chunks = [_build_chunk(hf_config, config, target, kernels, stage) for stage in virtual_stages]
    for chunk in chunks:
        chunk.hf_config, chunk.fp32_head = hf_config, fp32_head
        mark_split_parameters(chunk)
        if target.type != "meta":
            chunk.to(target)
            with torch.no_grad():
                for parameter in chunk.parameters():
                    parameter.fill_(math.nan)
    return chunks


def _build_chunk(
    hf_config: PretrainedConfig,
    config: TransformerConfig,
    device: torch.device,
    kernels: Kernels,
    vp_stage: int | None,
) -> GPTModel:
    """One run of consecutive layers; ``vp_stage`` is None if the rank has just one."""
    with device:
        return GPTModel(
            config=config,
            transformer_layer_spec=decoder_spec(config, kernels, vp_stage),
            vocab_size=padded_vocab_size(hf_config.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            parallel_output=True,
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            vp_stage=vp_stage,
            **rotary_arguments(hf_config),
        )


@torch.no_grad()
def initialize_randomly(model_chunks: Sequence[torch.nn.Module], seed: int) -> None:
    """Set every weight as a newly made Hugging Face model would have it: the same whole model for every layout.

    Matrices are normal with the config's ``initializer_range``, norms one, biases zero. Each parameter has a generator
    of its own, seeded by its whole-model name; every rank draws all of it and keeps its part.
    """
    hf_config = unwrapped(model_chunks)[0].hf_config
    for name, parameter in local_parameters(model_chunks):
        parts = [
            _random_tensor(f"{name}[{i}]", shape, hf_config, seed) for i, shape in enumerate(hf_shapes(name, hf_config))
        ]
        set_from_whole(name, parameter, from_hf(name, parts, hf_config))


def set_from_whole(name: str, parameter: torch.nn.Parameter, whole: torch.Tensor) -> None:
    """Copy this rank's part of a whole, unpadded parameter into place; padded vocabulary rows become zero."""
    group = shard_group(name)
    if name in (EMBEDDING, OUTPUT_LAYER):
        padded_rows = parameter.shape[0] * group.size() - whole.shape[0]
        whole = torch.nn.functional.pad(whole, (0, 0, 0, padded_rows))
    parameter.copy_(cut_shard(name, whole, group.size(), group.rank()))


def _random_tensor(name: str, shape: tuple[int, ...], hf_config: PretrainedConfig, seed: int) -> torch.Tensor:
    if len(shape) == 1:
        return torch.zeros(shape) if ".linear_qkv.bias" in name else torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, hf_config.initializer_range, generator=generator)


def _default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
