"""The layouts that docs/layouts.md proposes for 512 GPUs pass the checks and take the memory that it says."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from megatron_dppo.distributed.layout import ParallelConfig
from megatron_dppo.models.build import padded_vocab_size
from megatron_dppo.models.hf.config import check_policy_fits, load_hf_config
from megatron_dppo.models.hf.names import EMBEDDING, OUTPUT_LAYER, expert_index, hf_shapes, layer_index, parameter_names
from megatron_dppo.models.sharding import split_dimension

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"
GPUS = 512

_QWEN3 = {"vocab_size": 151936, "head_dim": 128}
_MOE = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, **_QWEN3}


def _sizes(hidden: int, mlp: int, layers: int, heads: int, key_value_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


POLICIES: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {**_MOE, "moe_intermediate_size": 768, **_sizes(2048, 6144, 48, 32, 4)},
    "Qwen3-235B-A22B": {**_MOE, "moe_intermediate_size": 1536, **_sizes(4096, 12288, 94, 64, 4)},
    "Qwen3-32B": {"model_type": "qwen3", **_QWEN3, **_sizes(5120, 25600, 64, 64, 8)},
    "Llama-3.3-70B": {"model_type": "llama", "vocab_size": 128256, **_sizes(8192, 28672, 80, 64, 8)},
}
LAYOUTS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in re.findall(r"^\|.*\|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if line.startswith(tuple(f"| {policy} |" for policy in POLICIES))
]


def _parameters_on_fullest_rank(hf_config: PretrainedConfig, parallel: ParallelConfig) -> tuple[float, float]:
    """(dense, experts'), counted by the names and shapes that weights are exchanged with."""
    layers_per_stage = hf_config.num_hidden_layers // parallel.pipeline_model_parallel_size
    dense_of_stage: dict[int, float] = defaultdict(float)
    experts = 0.0
    for name in parameter_names(hf_config):
        layer = layer_index(name)
        parameters = sum(math.prod(shape) for shape in hf_shapes(name, hf_config))
        if name in (EMBEDDING, OUTPUT_LAYER):
            parameters = padded_vocab_size(hf_config.vocab_size, parallel.tensor_model_parallel_size)
            parameters *= hf_config.hidden_size
        if expert_index(name) is not None:
            ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_size
            experts += parameters / ranks / parallel.pipeline_model_parallel_size
            continue
        ranks = 1 if split_dimension(name) is None else parallel.tensor_model_parallel_size
        if layer is not None:
            stage = layer // layers_per_stage
        else:
            stage = 0 if name == EMBEDDING else parallel.pipeline_model_parallel_size - 1
        dense_of_stage[stage] += parameters / ranks
    return max(dense_of_stage.values()), experts


def test_the_page_has_a_layout_for_every_policy() -> None:
    assert {row[0] for row in LAYOUTS} == set(POLICIES)


@pytest.mark.parametrize("row", LAYOUTS, ids=" ".join)
def test_a_proposed_layout_passes_the_checks_and_takes_the_stated_memory(row: list[str]) -> None:
    policy, *sizes = row[:7]
    tensor, pipeline, virtual, context, expert = (int(size) for size in sizes[:5])
    hf_config = load_hf_config(POLICIES[policy])
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=None if sizes[5] == "-" else int(sizes[5]),
    )
    check_policy_fits(hf_config, parallel, GPUS)
    dense, experts = _parameters_on_fullest_rank(hf_config, parallel)
    copies = GPUS // (tensor * pipeline)  # ranks that hold the same dense parameters: DP x CP
    expert_copies = GPUS // (expert * parallel.expert_tensor_size * pipeline)
    expected = (
        GPUS // parallel.replica_size,
        18e-9 * (dense + experts),
        1e-9 * (dense * (6 + 12 / copies) + experts * (6 + 12 / expert_copies)),
    )
    assert [float(cell) for cell in row[7:]] == pytest.approx(expected, abs=0.051)  # written with one decimal
