"""Write a small, randomly initialised policy as a Hugging Face folder, with a tokenizer made for the given tasks.

It loads like any published model, in seconds and on any machine: for the quick start, for tests, and for trying a
parallel layout before the real model. It knows nothing yet; the trainer's ``warm_start`` teaches it enough for
rewards to appear.

    python tools/setup/make_tiny_policy.py --task chain_sum --output models/tiny
    python tools/setup/make_tiny_policy.py --family llama --layers 4 --task chain_sum --task spell_backward --output
    models/tiny

The same flags and seed give the same weights.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dppo.errors import TaskError
from megatron_dppo.models.hf.config import rewrite_for_every_reader
from megatron_dppo.tasks.build import build_task
from megatron_dppo.tasks.config import TaskConfig
from tools.setup.tokenizer_training import train_tokenizer

FAMILIES = ("qwen3_moe", "qwen3", "llama")


@dataclass(frozen=True)
class TinyPolicySize:
    """Sizes under Hugging Face's names; ``experts`` and what follows it are read by qwen3_moe only."""

    layers: int = 2
    hidden_size: int = 128
    attention_heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 32
    ffn_size: int = 256
    experts: int = 4
    experts_per_token: int = 2
    expert_ffn_size: int = 128
    max_positions: int = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        help="reasoning-gym task whose questions the tokenizer knows; repeatable",
    )
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_moe")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in vars(TinyPolicySize()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    arguments = parser.parse_args()
    size = TinyPolicySize(**{name: getattr(arguments, name) for name in vars(TinyPolicySize())})
    logging.disable_progress_bar()
    try:
        tasks = [TaskConfig(name=name) for name in arguments.task]
        parameters = make_tiny_policy(arguments.output, tasks, arguments.family, size, arguments.seed)
    except (TaskError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {arguments.output}: {arguments.family}, {parameters:,} parameters")


def make_tiny_policy(
    output: Path,
    tasks: Sequence[TaskConfig],
    family: str = "qwen3_moe",
    size: TinyPolicySize | None = None,
    seed: int = 0,
) -> int:
    """Write model (fp32) and tokenizer into ``output``; returns the number of parameters.

    Raises ValueError on an unknown family or sizes that do not fit together, TaskError on a task that cannot be built.
    """
    tokenizer = train_tokenizer([build_task(config) for config in tasks])
    config = model_config(family, size or TinyPolicySize(), len(tokenizer))
    config.pad_token_id, config.bos_token_id, config.eos_token_id = (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(output)
    rewrite_for_every_reader(output)
    tokenizer.save_pretrained(output)
    return sum(parameter.numel() for parameter in model.parameters())


def model_config(family: str, size: TinyPolicySize, vocab_size: int) -> PretrainedConfig:
    """The Hugging Face config of a family in this size."""
    if size.attention_heads % size.key_value_heads:
        raise ValueError(
            f"attention_heads ({size.attention_heads}) must be a multiple of key_value_heads ({size.key_value_heads})"
        )
    if size.experts_per_token > size.experts:
        raise ValueError(f"experts_per_token ({size.experts_per_token}) exceeds experts ({size.experts})")
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.ffn_size,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.attention_heads,
        "num_key_value_heads": size.key_value_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.max_positions,
        "tie_word_embeddings": False,
    }
    if family == "llama":
        return LlamaConfig(**common)
    if family == "qwen3":
        return Qwen3Config(**common)
    if family == "qwen3_moe":
        return Qwen3MoeConfig(
            **common,
            num_experts=size.experts,
            num_experts_per_tok=size.experts_per_token,
            moe_intermediate_size=size.expert_ffn_size,
            norm_topk_prob=True,
        )
    raise ValueError(f"family {family!r} is unknown; choose one of {', '.join(FAMILIES)}")


if __name__ == "__main__":
    main()
