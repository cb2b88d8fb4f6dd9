"""Examples reach the ranks that learn from them, whole and unchanged, without pickles and without a second copy."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.training.data.hand_over import ExampleHeader, HandOver
from megatron_dppo.training.data.micro_batch import ExampleFields, TrainingExample
from tests.rank_pool import RankPools

LAYERS = 4
FIELDS = ExampleFields(rollout_log_probs=True, topk=3, routed_experts=(LAYERS, 2), expert_dtype=torch.uint8)


def example(number: int) -> TrainingExample:
    generator = torch.Generator().manual_seed(number)
    prompt, response = 2 + number % 3, 1 + number % 4
    return TrainingExample(
        token_ids=torch.randint(0, 150_000, (prompt + response,), generator=generator, dtype=torch.int32),
        prompt_length=prompt,
        advantage=float(torch.randn((), generator=generator)),
        rollout_log_probs=-torch.rand(response, generator=generator),
        topk_ids=torch.randint(0, 150_000, (response, 3), generator=generator),
        topk_log_probs=-torch.rand(response, 3, generator=generator),
        routed_experts=torch.randint(
            0, 256, (prompt + response - 1, LAYERS, 2), generator=generator, dtype=torch.int32
        ),
        trainable=number % 5 != 0,
    )


def header(number: int, source: int) -> ExampleHeader:
    made = example(number)
    return ExampleHeader(source, made.prompt_length, len(made.token_ids))


def _hand_over(layout: dict[str, int]) -> tuple[int, int, dict[int, dict[str, Any]]]:
    """On a rank: its replica, its pipeline stage, and what it was given."""
    initialize_model_parallel(ParallelConfig(**layout), seed=1)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    layers = range(LAYERS)[stage * LAYERS // stages : (stage + 1) * LAYERS // stages]
    hand_over = HandOver(FIELDS, layers)
    is_last = stage == stages - 1  # which alone computes the loss
    expected = {"rollout_log_probs": is_last, "topk": 3 if is_last else 0, "routed_experts": (len(layers), 2)}
    assert hand_over.fields == dataclasses.replace(FIELDS, **expected)
    headers = {number: header(number, number % replicas) for number in range(7)}
    owners = {number: (number // 2) % replicas for number in range(7) if number != 4}  # nobody learns from 4
    sampled = {n: example(n) for n in headers if n % replicas == replica} if hand_over.is_leader else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickle, "dumps", None)  # neither torch's collectives on objects nor anything else may
        patch.setattr(pickle, "Pickler", None)
        received = hand_over.hand_over(sampled, headers, owners)
    assert sorted(received) == [number for number, owner in owners.items() if owner == replica]
    return replica, stage, {number: vars(made) for number, made in received.items()}


@pytest.mark.parametrize(
    ("ranks_needed", "layout"),
    [
        (1, {}),
        (2, {}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        pytest.param(4, {"tensor_model_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"pipeline_model_parallel_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_every_rank_gets_its_replicas_examples_with_what_its_stage_reads(
    ranks: RankPools, ranks_needed: int, layout: dict[str, int]
) -> None:
    stages = layout.get("pipeline_model_parallel_size", 1)
    learned: dict[int, set[int]] = {}
    for replica, stage, received in ranks(ranks_needed).run(_hand_over, layout):
        learned.setdefault(replica, set()).update(received)
        for number, fields in received.items():
            expected = example(number)
            layers = slice(stage * LAYERS // stages, (stage + 1) * LAYERS // stages)
            expected = dataclasses.replace(expected, routed_experts=expected.routed_experts[:, layers])
            if stage < stages - 1:
                expected = dataclasses.replace(expected, rollout_log_probs=None, topk_ids=None, topk_log_probs=None)
            for name, value in vars(expected).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(
                        fields[name].long() if "log" not in name else fields[name],
                        value.to(torch.int64 if "log" not in name else value.dtype),
                    ), name
                elif isinstance(value, float):
                    assert fields[name] == pytest.approx(value, rel=1e-7)
                else:
                    assert fields[name] == value, name
    assert sorted(number for numbers in learned.values() for number in numbers) == [0, 1, 2, 3, 5, 6]


_EXPERTS, _TOKENS = (96, 8), 16_000


def _memory_for_a_large_payload(layout: dict[str, int]) -> tuple[int, int]:
    """(bytes of the payload, most that this process grew by meanwhile)."""
    initialize_model_parallel(ParallelConfig(**layout), seed=1)
    fields = ExampleFields(routed_experts=_EXPERTS, expert_dtype=torch.uint8)
    hand_over = HandOver(fields, range(_EXPERTS[0]))
    headers = {number: ExampleHeader(0, 1, _TOKENS + 1) for number in range(8)}
    payload = 8 * _TOKENS * _EXPERTS[0] * _EXPERTS[1]
    sampled = {}
    if hand_over.is_leader:
        experts = torch.ones(_TOKENS, *_EXPERTS, dtype=torch.uint8)
        tokens = torch.ones(_TOKENS + 1, dtype=torch.int32)
        sampled = {n: TrainingExample(tokens, 1, routed_experts=experts) for n in headers}
    # Once in small: the code that it takes is in memory from then on, and counts as this process's too.
    hand_over.hand_over(sampled, {0: headers[0]}, {0: 0})
    dist.barrier()
    before = _forget_peak()
    received = hand_over.hand_over(sampled, headers, dict.fromkeys(headers, 0))
    grown = _status_bytes("VmHWM") - before
    assert all(bool(received[n].routed_experts.all()) for n in headers)
    return payload, grown


def _forget_peak() -> int:
    """Begin to measure this process's peak anew; returns what it has in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


@pytest.mark.slow
def test_a_rank_needs_little_more_memory_than_what_it_gets(ranks: RankPools) -> None:
    """98 MB to each of 8 ranks: views into one buffer. 20 % more allow for what the allocator and sockets take."""
    for payload, grown in ranks(8).run(_memory_for_a_large_payload, {"tensor_model_parallel_size": 8}):
        assert payload > 90e6
        assert grown <= 1.2 * payload, f"{grown / payload:.2f} times the payload"
