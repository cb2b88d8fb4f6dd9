"""One optimizer step: forward and backward over the micro-batches, gradient reduction, clipping, Adam, schedule.

The loss is a sum over tokens; Megatron divides the summed gradients by the denominator (``num_tokens`` of the loss
function) summed over micro-batches, data- and context-parallel ranks, so the split of a batch does not change the update.

The model runs without its output layer: the last stage's chunk gives hidden states, and the loss applies the layer to those
of response tokens only (models/policy_head.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dppo.errors import LossInputError
from megatron_dppo.loss.checks import InputChecks
from megatron_dppo.models.policy_head import PolicyHead, hidden_states_only
from megatron_dppo.models.routing_replay import RoutingReplay
from megatron_dppo.training.data.micro_batch import MicroBatch
from megatron_dppo.training.policy.frozen_weights import FrozenWeights
from megatron_dppo.training.policy.trainable import OptimizerState, TrainablePolicy


class MicroBatchLoss(NamedTuple):
    """What the loss of a micro-batch gives to its optimizer step.

    Attributes:
        loss: scalar with gradient, summed over this rank's tokens.
        num_tokens: scalar, this rank's share of what the sum is divided by.
        checks: impossible values among its inputs, looked for but not looked at yet; or None.
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    checks: InputChecks | None = None


# (micro-batch, hidden states, [n, V/TP] logits of its response tokens under the rollout weights or None) -> its loss
LossOf = Callable[[MicroBatch, torch.Tensor, torch.Tensor | None], MicroBatchLoss]


class SkippedStepError(Exception):
    """A gradient is NaN or infinite, on some rank, so that no rank has applied the step.

    Attributes:
        suspects: this rank's micro-batches whose loss is not finite either.
    """

    def __init__(self, suspects: Sequence[MicroBatch]) -> None:
        super().__init__("a gradient is NaN or infinite: the step was not applied")
        self.suspects = suspects


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did.

    Attributes:
        grad_norm: global L2 norm before clipping.
        lr: the learning rate that was used.
    """

    grad_norm: float
    lr: float


def optimizer_step(
    policy: TrainablePolicy,
    optimizer_state: OptimizerState,
    micro_batches: Sequence[MicroBatch],
    loss_of: LossOf,
    rollout_weights: FrozenWeights | None = None,
    replay: RoutingReplay | None = None,
    check: Callable[[], None] = lambda: None,
) -> StepOutcome:
    """Update the policy once from this replica's micro-batches (the same number on every replica).

    Args:
        policy: the policy to update.
        optimizer_state: its optimizer and schedule.
        micro_batches: see data/batcher.py; moved to the policy's device one by one.
        loss_of: the loss of a micro-batch, from the last pipeline stage's hidden states.
        rollout_weights: given for an exact divergence: the rollout policy's logits are recomputed with them.
        replay: given to route tokens as the micro-batches say.
        check: called on every rank when all losses are known; what it raises ends the step.

    Raises:
        LossInputError, SkippedStepError: on every rank; the weights are left as they were.
    """
    for chunk in policy.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer_state.optimizer.zero_grad()

    found: list[tuple[MicroBatch, InputChecks]] = []
    losses: list[tuple[MicroBatch, torch.Tensor]] = []

    def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = policy.on_device(next(batches))
        output, loss_of_output = forward_micro_batch(batch, chunk, loss_of, rollout_weights, replay)

        def loss_function(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            loss, num_tokens, checks = loss_of_output(hidden)
            if checks is not None:
                found.append((batch, checks))
            losses.append((batch, loss.detach()))
            return loss, num_tokens.int(), {}  # Megatron adds the counts up in int32

        return output, loss_function

    policy.forward_backward.start()
    _run_schedule(policy, micro_batches, forward_step, forward_only=False)
    _refuse_a_wrong_step(policy, found, losses)
    check()
    lr = optimizer_state.lr
    _, grad_norm, _ = optimizer_state.optimizer.step()
    optimizer_state.scheduler.step(increment=1)
    return StepOutcome(grad_norm=float(grad_norm), lr=lr)


def forward_micro_batch(
    batch: MicroBatch,
    chunk: torch.nn.Module,
    loss_of: LossOf,
    rollout_weights: FrozenWeights | None = None,
    replay: RoutingReplay | None = None,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], MicroBatchLoss]]:
    """What a chunk passes on of a micro-batch on its device, and the loss of what the last stage's chunk passes on.

    See ``optimizer_step`` for the other arguments.
    """
    rollout_logits = None
    if rollout_weights is not None:  # no pipeline then: every chunk is the whole model
        with rollout_weights.in_place():
            head = PolicyHead(chunk)
            hidden_nh = head.response_hidden(_forward(chunk, batch, replay), batch.rows, batch.shape)
            rollout_logits = head.logits(hidden_nh)
    return _forward(chunk, batch, replay), lambda hidden: loss_of(batch, hidden, rollout_logits)


def _forward(chunk: torch.nn.Module, batch: MicroBatch, replay: RoutingReplay | None) -> torch.Tensor:
    """What a chunk passes on; of the last one, hidden states [B, S, h] ([B, S/TP, h] with sequence parallelism)."""
    with ExitStack() as stack:
        stack.enter_context(hidden_states_only(chunk))
        if replay is not None:
            if batch.routed_experts is None:
                raise ValueError(
                    "algorithm.routing_replay: the samples do not say which experts their tokens were routed to"
                )
            stack.enter_context(replay.forward_pass(chunk, batch.routed_experts))
        output: torch.Tensor = chunk(batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed_seq_params)
    return output


def _refuse_a_wrong_step(
    policy: TrainablePolicy,
    found: Sequence[tuple[MicroBatch, InputChecks]],
    losses: Sequence[tuple[MicroBatch, torch.Tensor]],
) -> None:
    """Look, once, before anything is applied: at the inputs of all micro-batches and at the gradients, on all ranks.

    An impossible input would go into the weights, and clipping by a norm that is NaN would write NaN into all of them. This
    is the first time in a step that the host waits for the device.
    """
    buffers = [buffer for chunk in policy.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    finite = torch.stack([buffer.grad_data.sum().isfinite() for buffer in buffers]).all()
    wrong = torch.stack([checks.failed() for _, checks in found]).any() if found else torch.zeros_like(finite)
    fine = torch.stack([~wrong, finite]).to(torch.int32)
    dist.all_reduce(fine, op=dist.ReduceOp.MIN)
    inputs_fine, gradients_finite = fine.tolist()
    if not inputs_fine:
        for batch, checks in found:
            checks.raise_errors(batch.describe)
        raise LossInputError("another rank was given impossible inputs, and says which; the step was not applied")
    if not gradients_finite:
        raise SkippedStepError([batch for batch, loss in losses if not bool(loss.isfinite())])


@torch.no_grad()
def forward_only(
    policy: TrainablePolicy,
    micro_batches: Sequence[MicroBatch],
    consume: Callable[[MicroBatch, torch.Tensor], torch.Tensor],
    replay: RoutingReplay | None = None,
) -> list[torch.Tensor]:
    """Run the policy without gradients.

    Args:
        policy: the policy.
        micro_batches: see data/batcher.py.
        consume: (micro-batch, hidden states) -> [n] a value for each response token on this context-parallel rank, called
            on the last pipeline stage.
        replay: given to route tokens as the micro-batches say.

    Returns:
        For each micro-batch, [rows, length] of its layout: the values where the tokens are predicted, 0 elsewhere. On the
        CPU, and on every rank of the replica.
    """
    training = [chunk.training for chunk in policy.chunks]
    for chunk in policy.chunks:
        chunk.eval()

    def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = policy.on_device(next(batches))

        def keep(hidden: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            return batch.in_layout(consume(batch, hidden))

        return _forward(chunk, batch, replay), keep

    kept = _run_schedule(policy, micro_batches, forward_step, forward_only=True)
    for chunk, was_training in zip(policy.chunks, training, strict=True):
        chunk.train(was_training)
    if parallel_state.get_context_parallel_world_size() > 1:
        for values in kept:
            dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
    return _from_last_stage(kept, micro_batches, policy.device)


def _run_schedule(
    policy: TrainablePolicy, micro_batches: Sequence[MicroBatch], forward_step: Any, forward_only: bool
) -> list[Any]:
    layout = micro_batches[0].layout  # a pipeline's micro-batches all have this shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in policy.chunks] if len(policy.chunks) > 1 else iter(micro_batches),
        model=policy.chunks if len(policy.chunks) > 1 else policy.chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=layout.length,
        micro_batch_size=layout.rows,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _from_last_stage(
    kept: list[torch.Tensor], micro_batches: Sequence[MicroBatch], device: torch.device
) -> list[torch.Tensor]:
    """Hand the last pipeline stage's results to all stages, on the CPU."""
    stages = parallel_state.get_pipeline_model_parallel_group()
    if stages.size() > 1:
        sizes = [batch.layout.rows * batch.layout.length for batch in micro_batches]
        flat = torch.empty(sum(sizes), device=device)
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            flat.copy_(torch.cat([values.flatten() for values in kept]))
        dist.broadcast(flat, dist.get_global_rank(stages, stages.size() - 1), group=stages)
        shapes = [(batch.layout.rows, batch.layout.length) for batch in micro_batches]
        kept = [values.view(shape) for values, shape in zip(flat.split(sizes), shapes, strict=True)]
    return [values.cpu() for values in kept]
