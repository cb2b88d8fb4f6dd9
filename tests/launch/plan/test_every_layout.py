"""Every layout, loss and dispatcher that a run may have can be planned."""

from __future__ import annotations

import pytest

from megatron_dppo.launch.plan.memory import StageMemory, memory_of_stages
from megatron_dppo.launch.plan.rank_plan import Setting
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.training.config.load import load_config
from tests.launch.plan.recipes import DENSE, MOE, QUICKSTART

SMALL = {
    "tensor_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
}
DEEP_MOE = {**MOE, "num_hidden_layers": 4}
PACKED = [
    "train.batching=packed",
    "rollout.max_prompt_tokens=16",
    "rollout.max_response_tokens=48",
    "train.tokens_per_micro_batch=128",
]


def _stages(fields: dict, world_size: int, layout: dict, *overrides: str) -> list[StageMemory]:
    sizes = [f"parallel.{name}={value}" for name, value in {**SMALL, **layout}.items()]
    config = load_config(QUICKSTART, [*sizes, "train.micro_batch_size=2", "algorithm.max_mismatch=0", *overrides])
    return memory_of_stages(config, load_hf_config(fields), Setting(world_size, expert_load=1.2))


@pytest.mark.parametrize(
    ("fields", "world_size", "layout"),
    [
        (
            {**DENSE, "num_hidden_layers": 4},
            2,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        ),
        ({**DENSE, "tie_word_embeddings": True, "num_hidden_layers": 3}, 3, {"pipeline_model_parallel_size": 3}),
        (DENSE, 2, {"tensor_model_parallel_size": 2, "sequence_parallel": "false"}),
        (MOE, 2, {"expert_model_parallel_size": 2, "moe_token_dispatcher": "allgather"}),
        (MOE, 4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    ],
    ids=["PP2 VPP2", "PP3 tied", "TP2 without SP", "EP2 allgather", "TP2 EP2 ETP2"],
)
def test_a_layout(fields, world_size, layout):
    stages = _stages(fields, world_size, layout)
    assert [stage.head > 0 for stage in stages] == [False] * (len(stages) - 1) + [True]
    assert all(0 < stage.held < stage.running for stage in stages)


def test_all_at_once_packed():
    layout = {
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 4,
    }
    first, last = _stages(DEEP_MOE, 16, layout, *PACKED)
    whole = _stages(DEEP_MOE, 1, {}, *PACKED)[0]
    assert first.kept.dense.parameters + last.kept.dense.parameters > whole.kept.dense.parameters / 2
    # A fourth of the tokens of half of the layers; not all of it is split, and an expert's tokens come from all ranks.
    assert first.held < whole.held / 4
    assert (first.in_flight, last.in_flight) == (2, 1)


@pytest.mark.parametrize("overrides", [["algorithm.loss.divergence=exact_tv"], ["algorithm.loss.kl_coef=0.1"]])
def test_copies_of_weights_are_counted(overrides):
    (stage,) = _stages(DENSE, 1, {}, *overrides)
    assert stage.kept.frozen == stage.kept.weights


def test_expert_choices_are_counted_where_they_are_replayed():
    (without,) = _stages(MOE, 1, {})
    (replayed,) = _stages(MOE, 1, {}, "algorithm.routing_replay=true")
    assert replayed.held - without.held == without.traced.tokens * 2 * 2  # layers x experts of a token, a byte each
