#!/usr/bin/env python3
"""The capacity plan beside step times that others have measured on GPUs: NeMo RL's published ones, in the same layouts.

    python -W ignore tools/check/plan_published.py

Source: NVIDIA-NeMo/RL, docs/about/performance-summary.md at c31fb937 (NeMo RL v0.4, GRPO on policy, DGX-H100, bf16,
Megatron-core): model, GPUs, samples a step, mean length, layouts of training and generation, tokens/s on each GPU, seconds of
a step. Training and generation take turns on the same GPUs there. Their steps have a pass more than ours: the policy's own
log-probs. How the lengths are spread is not published: a narrow distribution about the mean is taken, cut where theirs is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dppo.launch.plan.hardware import GPUS, assumptions_from
from megatron_dppo.launch.plan.plan import make_plan
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.training.config.load import load_config

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "conf" / "qwen3_30b_a3b.yaml"
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_attention_heads": 64,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
MOE = {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
QWEN3_32B = QWEN3 | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_key_value_heads": 8}
QWEN3_30B = (
    QWEN3
    | MOE
    | {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "moe_intermediate_size": 768}
)
QWEN3_235B = QWEN3 | MOE | {"hidden_size": 4096, "num_hidden_layers": 94, "moe_intermediate_size": 1536}


class Published(NamedTuple):
    """A row of the table. ``training``: TP, CP, EP, PP; ``serving``: TP."""

    name: str
    fields: dict[str, Any]
    gpus: int
    samples: int
    updates: int
    longest: int
    mean_length: int
    training: tuple[int, int, int, int]
    serving: int
    seconds: float
    options: tuple[str, ...] = ()


ROWS = (
    Published("Llama 3.1 8B", LLAMA_8B, 16, 2048, 4, 4096, 1060, (1, 1, 1, 2), 1, 97.7),
    Published("Qwen3-32B", QWEN3_32B, 32, 2048, 4, 4096, 3206, (4, 1, 1, 4), 4, 393),
    Published("Qwen3-30B-A3B", QWEN3_30B, 32, 2048, 4, 4096, 3154, (2, 1, 8, 1), 4, 225),
    Published(
        "Qwen3-235B-A22B",
        QWEN3_235B,
        128,
        512,
        1,
        8192,
        5671,
        (2, 2, 16, 8),
        16,
        506,
        ("parallel.num_layers_in_first_pipeline_stage=11", "parallel.num_layers_in_last_pipeline_stage=11"),
    ),
)


def overrides(row: Published) -> list[str]:
    tensor, context, expert, pipeline = row.training
    return [
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.context_parallel_size={context}",
        f"parallel.expert_model_parallel_size={expert}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
        "rollout.sglang.colocated=true",
        f"rollout.sglang.tensor_model_parallel_size={row.serving}",
        f"rollout.sglang.num_servers={row.gpus // row.serving}",
        "rollout.sglang.max_concurrent_requests=4096",
        "rollout.samples_per_prompt=32",
        f"rollout.prompts_per_step={row.samples // 32}",
        "rollout.max_prompt_tokens=512",
        f"rollout.max_response_tokens={row.longest - 512}",
        f"train.updates_per_rollout={row.updates}",
        f"train.tokens_per_micro_batch={row.longest}",
        "algorithm.loss.divergence=binary_tv",
        *row.options,
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| policy | GPUs | published s | planned s | planned / published | generate | update |")
    print("|---|---|---|---|---|---|---|")
    for row in ROWS:
        median = row.mean_length - 150 if row.mean_length < row.longest / 2 else 1.05 * row.mean_length
        narrow = ["response_sigma=0.3", "prompt_sigma=0.3", f"response_median={median}"]
        step = make_plan(
            load_config(RECIPE, overrides(row)),
            load_hf_config(row.fields),
            world_size=row.gpus,
            gpus_per_node=8,
            gpu=GPUS["h100"],
            assume=assumptions_from(narrow),
        ).step
        phases = step.phases
        print(
            f"| {row.name} | {row.gpus} | {row.seconds:g} | {step.total:.0f} | {step.total / row.seconds:.2f} |"
            f" {phases['generate']:.0f} | {phases['update'] + phases['optimizer']:.0f} |"
        )


if __name__ == "__main__":
    main()
