"""Tiny Hugging Face models of every supported kind, for tests in all folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_dppo.models.hf.config import load_hf_config

# "_tied" shares embedding and output weights. A vocabulary of 250 has padded rows in every layout.
KINDS = ("llama", "llama_tied", "qwen2", "qwen3", "qwen3_tied", "qwen3_moe")

_SHAPE = {
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}


def tiny_hf_config(kind: str, **overrides: Any) -> PretrainedConfig:
    """A config of about 100 k parameters; ``overrides`` replaces fields."""
    model_type = kind.removesuffix("_tied")
    fields = {**_SHAPE, **(_MOE if model_type == "qwen3_moe" else {}), "tie_word_embeddings": kind.endswith("_tied")}
    return load_hf_config({"model_type": model_type, **fields, **overrides})


def tiny_hf_model(kind: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model in which every weight matters.

    As initialised, the residual stream would drown what attention and MLP add: a wrong layer would hardly show in the
    logits. Matrices are scaled up, norms are not all ones and biases not zero.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_hf_config(kind, **overrides), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.mul_(50.0 if not kind.endswith("_tied") else 10.0)
            elif parameter.dim() >= 2:
                parameter.mul_(8.0)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def write_tiny_hf_model(kind: str, folder: str | Path, seed: int = 0, **overrides: Any) -> Path:
    """Save ``tiny_hf_model`` as a checkpoint folder (no tokenizer); returns the folder."""
    tiny_hf_model(kind, seed, **overrides).save_pretrained(folder)
    return Path(folder)
