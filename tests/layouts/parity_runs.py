"""One update of the policy in every supported layout, compared with the same update on a single rank.

Rows are layouts, columns ways to batch and to compute the loss. ``compare_with_one_rank`` is what the ranks run: it builds
the policy once and makes one update per column from the same weights. tests/layouts/test_parity_matrix.py holds the
differences against tolerances, tools/check/parity_table.py writes them down (docs/parity.md).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.loss.config import AGGREGATIONS, DPPOConfig
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.models.hf.weights import export_hf_weights
from megatron_dppo.models.policy_head import PolicyHead
from megatron_dppo.training.config.schema import AdamConfig, AlgorithmConfig, Config, TrainConfig
from megatron_dppo.training.data.micro_batch import TrainingExample
from megatron_dppo.training.policy.dppo_step import DPPOStep
from megatron_dppo.training.policy.trainable import TrainablePolicy, build_optimizer, wrap_for_training
from tests.example_sequences import examples, replica_batch
from tests.models.forced_routing import random_choices
from tests.models.tiny_policies import tiny_hf_config

LLAMA, QWEN3, QWEN3_MOE = "llama", "qwen3_tied", "qwen3_moe"
POLICIES = (LLAMA, QWEN3, QWEN3_MOE)
DENSE = (LLAMA, QWEN3)


@dataclass(frozen=True)
class Row:
    """A layout and the policies that it is tried with."""

    name: str
    ranks: int
    layout: dict[str, Any]  # of ParallelConfig
    policies: tuple[str, ...] = POLICIES
    num_layers: int = 4  # of the policy: two stages of two chunks


@dataclass(frozen=True)
class Column:
    """One way to batch the examples and to compute the loss."""

    batching: str
    aggregation: str
    fused_linear: bool
    routing_replay: bool = False

    @property
    def name(self) -> str:
        path = "fused linear" if self.fused_linear else "logits"
        return f"{self.batching}, {self.aggregation}, {path}{', routing replay' if self.routing_replay else ''}"

    @property
    def reference(self) -> Column:
        """The column that a single rank is asked for to compare with."""
        return Column("padded", self.aggregation, False, self.routing_replay)


def _layout(tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, **others: Any) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "expert_model_parallel_size": ep,
        **others,
    }


_VPP2 = {"virtual_pipeline_model_parallel_size": 2}
_ALLGATHER = {"moe_token_dispatcher": "allgather"}
_ETP2 = {"expert_tensor_parallel_size": 2}
_SHARDED_OPTIMIZER = {"use_distributed_optimizer": True}

# Ranks that a layout does not use up are data parallelism.
ROWS = (
    Row("1 rank", 1, _layout()),
    Row("DP2", 2, _layout()),
    Row("DP2, distributed optimizer", 2, _layout(**_SHARDED_OPTIMIZER)),
    Row("TP2", 2, _layout(tp=2), DENSE),
    Row("TP2, no sequence parallelism", 2, _layout(tp=2, sequence_parallel=False), DENSE),
    Row("TP2 ETP2", 2, _layout(tp=2, **_ETP2), (QWEN3_MOE,)),
    Row("PP2", 2, _layout(pp=2)),
    Row("PP2 VPP2", 2, _layout(pp=2, **_VPP2)),
    Row("CP2", 2, _layout(cp=2)),
    Row("CP2, distributed optimizer", 2, _layout(cp=2, **_SHARDED_OPTIMIZER), (QWEN3,)),
    Row("EP2 (DP2)", 2, _layout(ep=2), (QWEN3_MOE,)),
    Row("EP2 (DP2), allgather", 2, _layout(ep=2, **_ALLGATHER), (QWEN3_MOE,)),
    Row("TP2 EP2", 2, _layout(tp=2, ep=2), (QWEN3_MOE,)),
    Row("TP2 EP2, allgather", 2, _layout(tp=2, ep=2, **_ALLGATHER), (QWEN3_MOE,)),
    Row("CP2 EP2", 2, _layout(cp=2, ep=2), (QWEN3_MOE,)),
    Row("TP2 PP2", 4, _layout(tp=2, pp=2)),
    Row("TP2 CP2", 4, _layout(tp=2, cp=2)),
    Row("PP2 EP2 (DP2)", 4, _layout(pp=2, ep=2), (QWEN3_MOE,)),
    Row("TP2 EP2 ETP2 (DP2)", 4, _layout(tp=2, ep=2, **_ETP2), (QWEN3_MOE,)),
    Row("EP2 (DP4), distributed optimizer", 4, _layout(ep=2, **_SHARDED_OPTIMIZER), (QWEN3_MOE,)),
    Row("TP2 EP2 (DP2), distributed optimizer", 4, _layout(tp=2, ep=2, **_SHARDED_OPTIMIZER), (QWEN3_MOE,)),
    Row(
        "PP2 VPP2 CP2 EP2, distributed optimizer",
        4,
        _layout(pp=2, cp=2, ep=2, **_VPP2, **_SHARDED_OPTIMIZER),
        (QWEN3_MOE,),
    ),
)
# Not a row of the table: core's arithmetic for stages of unequal length, on top of the row "PP2".
UNEQUAL_STAGES = Row(
    "PP2 of 3 and 5 layers", 2, _layout(pp=2, num_layers_in_first_pipeline_stage=3), (QWEN3_MOE,), num_layers=8
)
_EVERY_POLICY = tuple(
    Column(batching, aggregation, fused)
    for batching, fused, aggregation in itertools.product(("padded", "packed"), (False, True), AGGREGATIONS)
)
_REPLAY = (
    Column("padded", "token_mean", False, routing_replay=True),
    Column("packed", "token_mean", True, routing_replay=True),
)
COLUMNS = {LLAMA: _EVERY_POLICY, QWEN3: _EVERY_POLICY, QWEN3_MOE: (*_EVERY_POLICY, *_REPLAY)}


@functools.cache
def on_every_push() -> dict[str, dict[str, list[Column]]]:
    """Name of the layout -> policy -> columns, few enough for every push.

    Every layout meets every choice that it can have (each policy, aggregation, replay or not) and each batching with each
    path to the loss; any two choices that go together come together in some layout.
    """
    candidates = [(row, policy, column) for row in ROWS for policy in row.policies for column in COLUMNS[policy]]
    left = set().union(*(_combinations(*candidate) for candidate in candidates))
    chosen: dict[str, dict[str, list[Column]]] = {}
    while left:
        row, policy, column = max(candidates, key=lambda candidate: len(_combinations(*candidate) & left))
        chosen.setdefault(row.name, {}).setdefault(policy, []).append(column)
        left -= _combinations(row, policy, column)
    return chosen


def _combinations(row: Row, policy: str, column: Column) -> set[Any]:
    """What a comparison brings together: any two of its choices, and the batching with the path to the loss in its layout."""
    choices = enumerate((row.name, policy, *dataclasses.astuple(column)))
    return {*itertools.combinations(choices, 2), (row.name, column.batching, column.fused_linear)}


# Up to two replicas have several micro-batches each: 8 sequences of 5 to 20 tokens, 103 tokens in all.
_MICRO_BATCH_SIZE, _TOKENS_PER_MICRO_BATCH = 2, 40
_LOSS = DPPOConfig(divergence="topk_kl", direction="predictive", delta_low=1e-3, delta_high=1e-3, entropy_coef=0.01)


def loss_of(aggregation: str) -> DPPOConfig:
    horizon = 16 if aggregation == "seq_mean_token_sum_norm" else None
    return dataclasses.replace(_LOSS, aggregation=aggregation, horizon=horizon)


# Adam's first step with a huge epsilon is -lr / eps times the gradient. With the usual epsilon it would be the gradient's
# sign, and where the gradient is almost 0 rounding would decide. A long step drowns the rounding of the weights.
_GRADIENT_DESCENT = AdamConfig(lr=1e6, adam_eps=1e3, clip_grad=0.0)


@dataclass(frozen=True)
class Update:
    """What one update computed; tensors are the whole model's, by Hugging Face name."""

    loss: float
    grad_norm: float
    mask_fraction: float
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]  # after the step


@dataclass(frozen=True)
class Difference:
    """Between an update and the single rank's. Largest over parameters, and later over ranks.

    Attributes:
        loss: relative.
        gradient: of a parameter's elements, relative to the parameter's largest.
        worst_parameter: the one that ``gradient`` is of.
        grad_norm: relative.
        movement: of a parameter's elements in the optimizer step, relative to the parameter's largest movement.
        mask_fraction: absolute; 0 unless another token was masked.
    """

    loss: float
    gradient: float
    worst_parameter: str
    grad_norm: float
    movement: float
    mask_fraction: float


@dataclass(frozen=True)
class Reference:
    """What a single rank did: all sequences in one padded micro-batch, through logits."""

    start: dict[str, torch.Tensor]  # the weights that every update starts from
    updates: dict[Column, Update]


def one_rank_updates(policy_kind: str, num_layers: int) -> Reference:
    """The updates that all columns of a policy are compared with."""
    policy = _policy(policy_kind, num_layers, ParallelConfig())
    start = _clones(export_hf_weights(policy.chunks))
    columns = {column.reference for column in COLUMNS[policy_kind]}
    return Reference(
        start, {column: _update(policy, ParallelConfig(), column, micro_batch_size=8) for column in columns}
    )


def compare_with_one_rank(
    policy_kind: str, num_layers: int, layout: dict[str, Any], columns: Sequence[Column], reference_file: str
) -> dict[Column, Difference]:
    """On each rank of a layout: how far each column's update is from ``one_rank_updates``, saved in a file."""
    reference: Reference = torch.load(reference_file, weights_only=False)
    parallel = ParallelConfig(**layout)
    policy = _policy(policy_kind, num_layers, parallel)
    return {
        column: difference(
            _update(policy, parallel, column, _MICRO_BATCH_SIZE), reference.updates[column.reference], reference.start
        )
        for column in columns
    }


def difference(update: Update, expected: Update, start: dict[str, torch.Tensor]) -> Difference:
    """Compare two updates of the same weights."""
    if update.gradients.keys() != expected.gradients.keys():
        raise AssertionError("the layout exports other parameters than a single rank")
    of_gradient = {n: _relative(update.gradients[n], g) for n, g in expected.gradients.items()}
    of_movement = [_relative(update.weights[n] - start[n], w - start[n]) for n, w in expected.weights.items()]
    farthest = max(of_gradient, key=lambda name: of_gradient[name])
    return Difference(
        loss=_infinite_if_nan(abs(update.loss / expected.loss - 1.0)),
        gradient=of_gradient[farthest],
        worst_parameter=farthest,
        grad_norm=_infinite_if_nan(abs(update.grad_norm / expected.grad_norm - 1.0)),
        movement=max(of_movement),
        mask_fraction=_infinite_if_nan(abs(update.mask_fraction - expected.mask_fraction)),
    )


def worst(differences: Sequence[Difference]) -> Difference:
    """The largest of every figure."""
    figures = {
        field.name: max(getattr(d, field.name) for d in differences)
        for field in dataclasses.fields(Difference)
        if field.name != "worst_parameter"
    }
    return Difference(**figures, worst_parameter=max(differences, key=lambda d: d.gradient).worst_parameter)


def _relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return _infinite_if_nan(float((value - expected).abs().max() / expected.abs().max()))


def _infinite_if_nan(value: float) -> float:
    """max() may pass over a NaN."""
    return math.inf if math.isnan(value) else value


def _policy(policy_kind: str, num_layers: int, parallel: ParallelConfig) -> TrainablePolicy:
    """Weights are so large that attention and experts matter."""
    initialize_model_parallel(parallel, seed=3)
    hf_config = tiny_hf_config(policy_kind, num_hidden_layers=num_layers, initializer_range=0.1)
    chunks = build_policy(hf_config, parallel, torch.float32, backend="local")
    initialize_randomly(chunks, seed=3)
    policy = wrap_for_training(chunks, hf_config, torch.float32, parallel)
    _check_that_the_layout_is_in_force(policy, parallel)
    return policy


def _check_that_the_layout_is_in_force(policy: TrainablePolicy, parallel: ParallelConfig) -> None:
    """An option that nobody reads would agree with a single rank very well."""
    config, chunk = policy.transformer_config, policy.chunks[0]
    assert len(policy.chunks) == (parallel.virtual_pipeline_model_parallel_size or 1)
    for name in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"):
        assert getattr(chunk.ddp_config, name) == getattr(parallel, name)
    assert config.sequence_parallel == parallel.uses_sequence_parallel
    if config.num_moe_experts is not None:
        assert config.moe_token_dispatcher_type == parallel.moe_token_dispatcher


def _update(policy: TrainablePolicy, parallel: ParallelConfig, column: Column, micro_batch_size: int) -> Update:
    """One update with a fresh optimizer; the policy has its old weights back afterwards."""
    config = Config(
        parallel=parallel,
        algorithm=AlgorithmConfig(
            loss=loss_of(column.aggregation),
            routing_replay=column.routing_replay,
            max_mismatch=0.0,  # made-up rollouts
        ),
        train=TrainConfig(
            updates_per_rollout=1,
            batching=column.batching,
            micro_batch_size=micro_batch_size,
            tokens_per_micro_batch=_TOKENS_PER_MICRO_BATCH,
            fused_linear=column.fused_linear,
        ),
    )
    optimizer_state = build_optimizer(policy, _GRADIENT_DESCENT, total_steps=1)
    start = [parameter.detach().clone() for parameter in _parameters(policy)]
    step = DPPOStep(config, policy, optimizer_state)
    with _check_that_the_column_is_in_force(policy, column):
        metrics = step.run(replica_batch(step, _examples(policy, column, step.routed_layers), 1))
    weights = _clones(export_hf_weights(policy.chunks))
    with torch.no_grad():
        for parameter, weight in zip(_parameters(policy), start, strict=True):
            parameter.copy_(weight)
    if parallel.use_distributed_optimizer:
        _gather_gradient_shards(policy)
    with _gradients_in_place_of_weights(policy):
        gradients = _clones(export_hf_weights(policy.chunks))
    return Update(metrics["loss"], metrics["grad_norm"], metrics["dppo/mask_fraction"], gradients, weights)


def _examples(policy: TrainablePolicy, column: Column, layers: Sequence[int]) -> list[TrainingExample]:
    """Eight sequences; with routing replay their tokens go to experts that the router would not choose."""
    if not column.routing_replay:
        return examples()
    config = policy.transformer_config

    def choices(seed: int, tokens: int) -> torch.Tensor:
        of_all = random_choices(tokens, config.num_layers, config.num_moe_experts, config.moe_router_topk, seed)
        return of_all[:-1, list(layers)]

    return [
        dataclasses.replace(example, routed_experts=choices(seed, len(example.token_ids)))
        for seed, example in enumerate(examples())
    ]


@contextmanager
def _check_that_the_column_is_in_force(policy: TrainablePolicy, column: Column) -> Iterator[None]:
    packed: list[bool] = []

    def look_at_batch(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        packed.append(kwargs["packed_seq_params"] is not None)

    hook = policy.chunks[0].register_forward_pre_hook(look_at_batch, with_kwargs=True)
    with mock.patch.object(PolicyHead, "logits", autospec=True, side_effect=PolicyHead.logits) as logits:
        yield
    hook.remove()
    assert packed == [column.batching == "packed"] * len(packed) != []
    assert logits.called == (not column.fused_linear and parallel_state.is_pipeline_last_stage(ignore_virtual=True))


def _parameters(policy: TrainablePolicy) -> list[torch.nn.Parameter]:
    return [parameter for chunk in policy.chunks for parameter in chunk.parameters()]


def _clones(tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """On the host: what is compared may come from another rank's device."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}


def _gather_gradient_shards(policy: TrainablePolicy) -> None:
    """The distributed optimizer leaves each data-parallel rank one summed shard of every bucket of gradients."""
    for chunk in policy.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


@contextmanager
def _gradients_in_place_of_weights(policy: TrainablePolicy) -> Iterator[None]:
    """Within, the exporter finds the gradients where it looks for weights."""
    parameters = _parameters(policy)
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad
    yield
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
