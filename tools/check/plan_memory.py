#!/usr/bin/env python3
"""Whether the capacity plan is right about memory: steps of the real trainer on CPU ranks, measured, beside what is planned.

    python -W ignore tools/check/plan_memory.py            # all layouts
    python -W ignore tools/check/plan_memory.py "PP2" --json

Measured is the resident memory of a rank's process: what it has more after a training step than before the policy was built
(kept), and what it had more at most during the next step (peak). Before, the same was done with a tiny policy, so that
libraries and groups have theirs. malloc is told to give back at once what is freed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_dppo.distributed.layout import initialize_model_parallel
from megatron_dppo.launch.plan.largest_batch import largest_batch
from megatron_dppo.launch.plan.memory import Setting, memory_of_stages
from megatron_dppo.models.build import initialize_randomly
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.training.config.load import load_config
from megatron_dppo.training.config.schema import MODEL_DTYPES, Config
from megatron_dppo.training.policy.dppo_step import DPPOStep
from megatron_dppo.training.policy.trainable import build_chunks, build_optimizer, wrap_for_training

RANKS = 2
DENSE = {
    "model_type": "qwen3",
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
}
PACKED = [
    "train.batching=packed",
    "rollout.max_prompt_tokens=64",
    "rollout.max_response_tokens=448",
    "train.tokens_per_micro_batch=1024",
    "algorithm.max_mismatch=0",
    "train.kernel_backend=auto",
]
LAYOUTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dense TP2": (DENSE, ["parallel.tensor_model_parallel_size=2"]),
    "MoE TP2 EP2": (
        MOE,
        [
            "parallel.tensor_model_parallel_size=2",
            "parallel.expert_model_parallel_size=2",
            "parallel.expert_tensor_parallel_size=1",
        ],
    ),
    "PP2": (DENSE, ["parallel.pipeline_model_parallel_size=2"]),
    "dense TP2, recomputed, fused": (
        DENSE,
        ["parallel.tensor_model_parallel_size=2", "model.recompute.granularity=full", "train.fused_linear=true"],
    ),
    "bf16, distributed optimizer": (DENSE, ["parallel.use_distributed_optimizer=true", "model.dtype=bf16"]),
}


def recipe(overrides: list[str]) -> Config:
    quickstart = Path(__file__).resolve().parents[2] / "examples" / "conf" / "quickstart.yaml"
    return load_config(
        quickstart,
        [*PACKED, "parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=1", *overrides],
    )


def resident(field: str = "VmRSS") -> int:
    """Bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def steps_measured(config: Config, fields: dict[str, Any]) -> tuple[int, int]:
    """Bytes: (kept after a step, most during the next), more than before."""
    gc.collect()
    before = resident()
    hf_config = load_hf_config(fields)
    chunks = build_chunks(config.model, config.parallel, hf_config, torch.device("cpu"))
    initialize_randomly(chunks, seed=1)
    dtype = MODEL_DTYPES[config.model.dtype]
    policy = wrap_for_training(chunks, hf_config, dtype, config.parallel)
    step = DPPOStep(config, policy, build_optimizer(policy, config.train.optimizer, 10))
    batch = largest_batch(config, hf_config, 32, micro_batches=config.parallel.pipeline_model_parallel_size)
    step.run(batch)
    gc.collect()
    kept = resident() - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step.run(batch)
    return kept, resident("VmHWM") - before


def on_rank(rank: int, store: str, name: str) -> None:
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 1 << 18)  # M_TRIM_THRESHOLD
    torch.set_num_threads(1)
    fields, overrides = LAYOUTS[name]
    config = recipe(overrides)
    dist.init_process_group("gloo", init_method=f"file://{store}/meeting", rank=rank, world_size=RANKS)
    initialize_model_parallel(config.parallel, seed=1)
    steps_measured(
        config, fields | {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 64}
    )
    Path(store, f"{rank}.json").write_text(json.dumps(steps_measured(config, fields)))
    dist.barrier()
    dist.destroy_process_group()


def compared(name: str) -> list[dict[str, float]]:
    """Of each rank: bytes, measured and planned."""
    with tempfile.TemporaryDirectory() as store:
        mp.spawn(on_rank, (store, name), nprocs=RANKS)
        measured = [json.loads(Path(store, f"{rank}.json").read_text()) for rank in range(RANKS)]
    fields, overrides = LAYOUTS[name]
    config = recipe(overrides)
    stages = memory_of_stages(config, load_hf_config(fields), Setting(RANKS, RANKS, prompt_tokens=32, as_on_cuda=False))
    result = []
    for rank, (kept, peak) in enumerate(measured):
        planned = stages[rank * len(stages) // RANKS]
        result.append({"kept": kept, "kept_planned": planned.kept.total, "peak": peak, "peak_planned": planned.total})
    return result


def print_rows(name: str, of_ranks: list[dict[str, float]]) -> None:
    for rank, of in enumerate(of_ranks):
        pairs = [(of[key] / 1e6, of[f"{key}_planned"] / 1e6) for key in ("kept", "peak")]
        numbers = " ".join(f"{real:9.1f} {planned:9.1f} {planned / real:6.3f}" for real, planned in pairs)
        print(f"{name:30} {rank:4} {numbers}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", default=list(LAYOUTS), help=f"some of: {', '.join(LAYOUTS)}")
    parser.add_argument("--json", action="store_true", help="one object, layout -> ranks")
    options = parser.parse_args()
    results = {}
    if not options.json:
        print(
            f"{'layout':30} rank {'kept MB':>9} {'planned':>9} {'ratio':>6} {'peak MB':>9} {'planned':>9} {'ratio':>6}"
        )
    for name in options.layouts:
        results[name] = compared(name)
        if not options.json:
            print_rows(name, results[name])
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
