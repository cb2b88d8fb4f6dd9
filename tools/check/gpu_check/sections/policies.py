"""Policies that sections build in their own process: random weights, one rank, in a layout of one."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.models.hf.config import load_hf_config

# 0.6 B parameters (Qwen3-0.6B) on a GPU; on a CPU the same in a thousandth.
_QWEN3_0_6B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}
_SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def policy_config(device: str) -> Any:
    """A Qwen3 policy's config."""
    sizes = _QWEN3_0_6B if device == "cuda" else _SMALL
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return load_hf_config({"model_type": "qwen3", **sizes, "rope_parameters": rope, "tie_word_embeddings": True})


def start_one_rank(device: str) -> None:
    """torch.distributed and Megatron's groups for this process alone; done once."""
    if dist.is_initialized():
        return
    store = tempfile.NamedTemporaryFile(prefix="gpu_check_store_")  # noqa: SIM115  the process keeps it
    if device == "cuda":
        torch.cuda.set_device(0)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store.name}_0", rank=0, world_size=1)
    initialize_model_parallel(ParallelConfig(), seed=1)


def random_policy(device: str, dtype: torch.dtype, layers: int | None = None, backend: str = "local") -> list[Any]:
    """The policy with weights that depend on nothing but their names.

    Args:
        device: cuda | cpu.
        dtype: of the weights.
        layers: so many only.
        backend: whose layers (``build_policy``). What is compared in fp32 needs local ones: Transformer Engine multiplies
            fp32 matrices in TF32, of 11 bits.
    """
    start_one_rank(device)
    hf_config = policy_config(device)
    if layers is not None:
        hf_config.num_hidden_layers = layers
    # Gradients are wanted where autograd puts them: there is no DistributedDataParallel with fp32 ones.
    chunks = build_policy(hf_config, ParallelConfig(), dtype, backend=backend, gradient_accumulation_fusion=False)
    initialize_randomly(chunks, seed=0)
    return chunks
