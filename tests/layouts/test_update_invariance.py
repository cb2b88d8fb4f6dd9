"""One optimizer step is a function of the batch alone: not of micro-batches, ranks or layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.models.hf.weights import export_hf_weights
from megatron_dppo.training.config.schema import AdamConfig, AlgorithmConfig, Config, TrainConfig
from megatron_dppo.training.data.batcher import ReplicaBatch
from megatron_dppo.training.data.schedule import PlannedMicroBatch, Scheduler
from megatron_dppo.training.metrics.token_record import StepTokens, gathered
from megatron_dppo.training.policy.dppo_step import DPPOStep
from megatron_dppo.training.policy.trainable import build_optimizer, wrap_for_training
from tests.example_sequences import examples, replica_batch
from tests.models.tiny_policies import tiny_hf_config

# Adam with a huge epsilon moves weights in proportion to the gradient, so comparing weights compares gradients. At the usual
# epsilon the first step is the sign of the gradient, and rounding decides where it is almost 0.
GRADIENT_DESCENT = AdamConfig(lr=1e3, adam_eps=1e3, clip_grad=0.0)
LOSS = DPPOConfig(divergence="topk_kl", direction="predictive", delta_low=1e-3, delta_high=1e-3, entropy_coef=0.01)
LAYERS = 4  # two stages of two chunks
TRACED, MOST_TOKENS = (0, 3), 6  # examples whose single tokens are recorded, and how many of each
METRICS = ("loss", "entropy", "grad_norm", "dppo/mask_fraction", "dppo/divergence_mean", "dppo/divergence_max")


Result = tuple[dict[str, Any], dict[str, torch.Tensor], StepTokens]


def padded(size: int) -> dict[str, Any]:
    return {"batching": "padded", "micro_batch_size": size}


def packed(tokens: int) -> dict[str, Any]:
    return {"batching": "packed", "tokens_per_micro_batch": tokens}


def _update(
    layout: dict[str, Any],
    train: dict[str, Any],
    loss: dict[str, Any],
    anchor: str = "rollout",
    batch: Callable[[DPPOStep], ReplicaBatch] | None = None,
) -> Result:
    """On a rank: metrics of one optimizer step, the weights after it, and what it did to single tokens."""
    parallel = ParallelConfig(**layout)
    initialize_model_parallel(parallel, seed=3)
    hf_config = tiny_hf_config("qwen3_moe", num_hidden_layers=LAYERS)
    chunks = build_policy(hf_config, parallel, torch.float32)
    initialize_randomly(chunks, seed=3)
    policy = wrap_for_training(chunks, hf_config, torch.float32)
    config = Config(
        parallel=parallel,
        algorithm=AlgorithmConfig(
            loss=dataclasses.replace(LOSS, **loss), anchor=anchor, max_mismatch=0.0
        ),  # made-up rollouts
        train=TrainConfig(updates_per_rollout=1, **train),
    )
    optimizer_state = build_optimizer(policy, GRADIENT_DESCENT, total_steps=1)
    step = DPPOStep(config, policy, optimizer_state)
    metrics = step.run(replica_batch(step, examples(), 1) if batch is None else batch(step), TRACED)
    weights = {n: t.clone() for n, t in export_hf_weights(policy.chunks)}
    return {name: metrics[name] for name in METRICS}, weights, gathered(step.token_records, MOST_TOKENS)


def assert_same_step(result: Result, reference: Result, start: dict[str, torch.Tensor]) -> None:
    """Metrics to 1e-5 and every parameter's movement to 1e-5 of that parameter's largest.

    A gradient is a sum of ~100 tokens through two fp32 layers; reordering the sums changes it by some 1e-6 of its
    largest element, and subtracting the starting weights (0.02) from the moved ones adds their rounding.
    """
    assert result[0] == pytest.approx(reference[0], rel=1e-5, abs=1e-7)
    assert_same_tokens(result[2], reference[2])
    for name, weight in reference[1].items():
        movement, expected = result[1][name] - start[name], weight - start[name]
        rounding = 2.0**-23 * float(start[name].abs().max())
        assert float((movement - expected).abs().max()) <= 1e-5 * float(expected.abs().max()) + rounding, name


def assert_same_tokens(tokens: StepTokens, reference: StepTokens) -> None:
    """Sums to 1e-5 and single tokens to 1e-3: they have 4 digits, and a rounding more or less of those."""
    for bins, expected in (
        (tokens.by_position, reference.by_position),
        (tokens.by_probability, reference.by_probability),
    ):
        assert torch.allclose(torch.tensor(bins), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert tokens.traces.keys() == reference.traces.keys() == set(TRACED)
    for number, trace in reference.traces.items():
        places = sorted(trace)
        assert places == sorted(tokens.traces[number])
        found = torch.tensor([tokens.traces[number][place] for place in places])
        assert torch.allclose(found, torch.tensor([trace[place] for place in places]), rtol=1e-3, atol=1e-5)


def _initial_weights() -> dict[str, torch.Tensor]:
    initialize_model_parallel(ParallelConfig(), seed=3)
    chunks = build_policy(tiny_hf_config("qwen3_moe", num_hidden_layers=LAYERS), ParallelConfig(), torch.float32)
    initialize_randomly(chunks, seed=3)
    return {name: tensor.clone() for name, tensor in export_hf_weights(chunks)}


def _layout(tp: int = 1, pp: int = 1, chunks: int = 1, cp: int = 1, ep: int = 1) -> dict[str, int]:
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": chunks,
        "context_parallel_size": cp,
        "expert_model_parallel_size": ep,
    }


# tests/layouts/test_parity_matrix.py has all layouts; these are the ones with something special about their batches.
BATCHINGS = (
    (_layout(), packed(30)),  # data parallel 2: the replicas' shares differ in length
    (_layout(cp=2), packed(40)),  # sequences that are split are counted once
    (_layout(ep=2), packed(30)),  # replicas hold each other's experts
    (_layout(ep=2), padded(4)),
    (_layout(tp=2, ep=2), {**packed(1000), "fused_linear": True}),
    (_layout(pp=2), packed(40)),  # equal shapes
    (_layout(cp=2), padded(3)),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aggregation", "batchings"),
    [
        ("token_mean", BATCHINGS),
        # In these layouts they are columns of the matrix.
        pytest.param("seq_mean_token_mean", BATCHINGS[:2], marks=pytest.mark.nightly),
        pytest.param("seq_mean_token_sum_norm", BATCHINGS[:2], marks=pytest.mark.nightly),
    ],
)
def test_a_step_does_not_depend_on_micro_batches_ranks_or_layout(ranks, aggregation, batchings):
    loss = {"aggregation": aggregation}
    if aggregation == "seq_mean_token_sum_norm":
        loss["horizon"] = 16
    (start,) = ranks(1).run(_initial_weights)
    (reference,) = ranks(1).run(_update, _layout(), padded(8), loss)
    assert 0.0 < reference[0]["dppo/mask_fraction"] < 1.0  # the trust region has something to do
    for train in (padded(3), packed(30), {**packed(30), "fused_linear": True}):
        (split,) = ranks(1).run(_update, _layout(), train, loss)
        assert_same_step(split, reference, start)
    for layout, train in batchings:
        for result in ranks(2).run(_update, layout, train, loss):
            assert_same_step(result, reference, start)


def _each_its_own(step: DPPOStep) -> ReplicaBatch:
    """Every replica keeps two examples, one to a micro-batch; the last one has the longest."""
    balanced = replica_batch(step, examples(), 1)
    replica = parallel_state.get_data_parallel_rank()
    mine = [
        PlannedMicroBatch((number,), len(balanced.examples[number].token_ids))
        for number in (2 * replica, 2 * replica + 1)
    ]
    return dataclasses.replace(balanced, steps=[mine])


def _tokens_of_replicas(unbalanced: bool) -> int:
    """Of this one's examples."""
    initialize_model_parallel(ParallelConfig(), seed=3)
    scheduler = Scheduler(TrainConfig(**packed(30)), ParallelConfig(), 4, float)
    lengths = {number: len(example.token_ids) for number, example in enumerate(examples())}
    owners = scheduler.schedules(lengths, 1)[0].owners()
    replica = parallel_state.get_data_parallel_rank()
    return sum(length for n, length in lengths.items() if (n // 2 if unbalanced else owners[n]) == replica)


@pytest.mark.slow
def test_four_replicas_learn_the_same_however_evenly_the_work_is_dealt(ranks):
    """Loss to 1e-6, every parameter's movement to 1e-5 of its largest."""
    even, uneven = (ranks(4).run(_tokens_of_replicas, unbalanced) for unbalanced in (False, True))
    assert max(even) <= 1.2 * sum(even) / 4
    assert max(uneven) >= 1.4 * sum(uneven) / 4
    (start,) = ranks(1).run(_initial_weights)
    loss = {"aggregation": "token_mean"}
    balanced = ranks(4).run(_update, _layout(), packed(30), loss)[0]
    for result in ranks(4).run(_update, _layout(), packed(30), loss, "rollout", _each_its_own):
        assert_same_step(result, balanced, start)
        assert result[0]["loss"] == pytest.approx(balanced[0]["loss"], rel=0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "train", [pytest.param(padded(4), marks=pytest.mark.nightly, id="padded"), pytest.param(packed(30), id="packed")]
)
def test_what_needs_more_forward_passes_does_not_depend_on_layout_either(ranks, train):
    """Exact divergence (rollout logits), reference policy, recomputed anchor: each finds its tokens again."""
    (start,) = ranks(1).run(_initial_weights)
    for loss, anchor, layouts in (
        ({"divergence": "exact_tv", "direction": "ratio"}, "rollout", (_layout(tp=2), _layout(cp=2))),
        (
            {"divergence": "binary_kl", "direction": "ratio", "kl_coef": 0.1},
            "recomputed",
            (_layout(pp=2), _layout(cp=2)),
        ),
    ):
        (reference,) = ranks(1).run(_update, _layout(), padded(8), loss, anchor)
        for layout in layouts:
            for result in ranks(2).run(_update, layout, train, loss, anchor):
                assert_same_step(result, reference, start)
