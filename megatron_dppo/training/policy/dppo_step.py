"""The update phase of one training step: several optimizer steps of the DPPO loss on one rollout batch.

The first step of a batch is on-policy up to the numerical mismatch between training and serving; the later ones move
away from the policy that generated the samples, and there the trust region matters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from functools import partial, reduce
from operator import add

import torch
from megatron.core import parallel_state

from megatron_dppo.errors import MismatchError
from megatron_dppo.loss.dppo_loss import DPPOLoss
from megatron_dppo.loss.improvement_bound import ResponseSums
from megatron_dppo.loss.linear_head import LinearHead
from megatron_dppo.loss.metrics import MetricSums
from megatron_dppo.models.policy_head import PolicyHead
from megatron_dppo.models.routing_replay import RoutingReplay
from megatron_dppo.ops.backend import choose_backend
from megatron_dppo.ops.tile_tree import deterministic_choice
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.data.batcher import MicroBatcher, ReplicaBatch
from megatron_dppo.training.data.micro_batch import MicroBatch
from megatron_dppo.training.data.schedule import PADDING, Scheduler
from megatron_dppo.training.metrics.loss import global_bound, global_metrics
from megatron_dppo.training.metrics.step import BatchMetrics
from megatron_dppo.training.metrics.token_record import TokenRecord
from megatron_dppo.training.policy.frozen_weights import FrozenWeights
from megatron_dppo.training.policy.head_outputs import response_log_probs
from megatron_dppo.training.policy.optimizer_step import (
    MicroBatchLoss,
    SkippedStepError,
    StepOutcome,
    forward_micro_batch,
    forward_only,
    optimizer_step,
)
from megatron_dppo.training.policy.trainable import OptimizerState, TrainablePolicy


@dataclasses.dataclass
class _StepParts:
    """What the losses of one optimizer step tell, of each micro-batch; nothing but on the last pipeline stage.

    Attributes:
        traced: numbers of the examples whose single tokens are recorded.
    """

    traced: Collection[int]
    metrics: list[MetricSums] = dataclasses.field(default_factory=list)
    responses: list[ResponseSums] = dataclasses.field(default_factory=list)
    tokens: list[TokenRecord] = dataclasses.field(default_factory=list)


# A loss per token of a bf16 or fp32 model: nothing divides or scales it before backward.
_BACKWARD_SCALE = 1.0


class DPPOStep:
    """Turns examples into optimizer steps and metrics. All ranks call ``run`` together.

    Attributes:
        scheduler: makes the schedules that a batch's micro-batches are of.
        frozen: copies of weights that it computes with beside the present ones.
        skipped_in_a_row: optimizer steps that were not applied since the last that was, as their gradients were not finite.
        token_records: what the last ``run`` did to single tokens, of this rank's micro-batches whose step was applied.
        routed_layers: those whose expert choices this rank replays, in the order in which examples have them; none without
            routing replay.
    """

    def __init__(
        self,
        config: Config,
        policy: TrainablePolicy,
        optimizer_state: OptimizerState,
        keep_evidence: Callable[[Sequence[MicroBatch]], None] = lambda suspects: None,
    ) -> None:
        """``keep_evidence`` is called with this rank's micro-batches that may be to blame for a step that was skipped."""
        self._keep_evidence = keep_evidence
        self.scheduler = Scheduler(
            config.train,
            config.parallel,
            parallel_state.get_data_parallel_world_size(),
            policy.flops.training,
        )
        self.skipped_in_a_row = 0
        self.token_records: list[TokenRecord] = []
        self._config = config
        self._policy = policy
        self._optimizer_state = optimizer_state
        # Which kernels the loss takes: the logits have the parameters' dtype.
        self._backend = choose_backend(config.train.kernel_backend, next(policy.chunks[0].parameters()).detach()).name
        # Log-probs that the policy itself recomputes are no engine's fault, however low.
        from_engine = config.algorithm.anchor == "rollout"
        self._batcher = MicroBatcher(self.scheduler, config.rollout.log_prob_floor if from_engine else -math.inf)
        loss_config = config.algorithm.loss
        self._loss = DPPOLoss(
            loss_config,
            vocab_size=policy.vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            backend=config.train.kernel_backend,
            deterministic=deterministic_choice(config.train.deterministic),
            inplace_backward=True,
            backward_scale=_BACKWARD_SCALE,
            # The optimizer step looks once, before it is applied; to look in every call would drain the device's queue.
            checks="deferred",
        )
        self._rollout_weights = FrozenWeights(policy.chunks) if loss_config.needs_rollout_logits else None
        # The reference policy is the one that training starts from.
        self._reference_weights = FrozenWeights(policy.chunks) if loss_config.kl_coef else None
        self.frozen = [kept for kept in (self._rollout_weights, self._reference_weights) if kept is not None]
        self._replay = RoutingReplay(policy.chunks) if config.algorithm.routing_replay else None
        self.routed_layers = () if self._replay is None else self._replay.layers

    def run(self, batch: ReplicaBatch, traced: Collection[int] = ()) -> dict[str, float | str]:
        """Learn from this replica's part of one rollout batch; returns global metrics.

        They are numbers but for ``backend``, which names the kernels that ran. An optimizer step whose gradients are not
        finite, on any rank, is skipped on all; the metrics are those of the others. ``token_records`` has every token of the
        examples with the numbers ``traced``.

        Raises MismatchError, on every rank and before anything was learned, if the rollouts are not the policy's own.
        """
        if self._rollout_weights is not None:
            self._rollout_weights.refresh()  # the engine samples with the weights as they are before the first step
        batch = self._with_extra_log_probs(batch)
        on_policy: dict[str, float] | None = None  # of the first optimizer step that is applied
        every: MetricSums | None = None
        of_last_step: list[ResponseSums] = []  # that was applied: the one whose policy is furthest from the engine's
        batches = BatchMetrics()
        self.token_records = []
        outcome = StepOutcome(grad_norm=math.nan, lr=self._optimizer_state.lr)
        skipped = 0
        for step in range(len(batch.steps)):
            micro_batches = self._batcher.micro_batches(batch, step)
            batches.add(micro_batches)
            parts = _StepParts(traced)

            def check(parts: _StepParts = parts) -> None:
                nonlocal on_policy
                if on_policy is None:
                    on_policy = self._checked_mismatch(parts.metrics)

            try:
                outcome = optimizer_step(
                    self._policy,
                    self._optimizer_state,
                    micro_batches,
                    partial(self._loss_of, parts),
                    self._rollout_weights,
                    self._replay,
                    check,
                )
            except SkippedStepError as error:
                skipped += 1
                self.skipped_in_a_row += 1
                self._keep_evidence(error.suspects)
                continue
            self.skipped_in_a_row = 0
            of_last_step = parts.responses
            self.token_records += parts.tokens
            if parts.metrics:  # on the last pipeline stage
                step_metrics = MetricSums.total(parts.metrics)
                every = step_metrics if every is None else every + step_metrics
        self._policy.gather_weights()
        bound = {}
        if self._config.logging.improvement_bound:
            bound = global_bound(reduce(add, of_last_step) if of_last_step else None)
        replayed = {} if self._replay is None else {"mismatch/rerouted_share": self._replay.replayed_differently()}
        return {
            **global_metrics(every),
            **(on_policy or {}),
            **bound,
            **replayed,
            **batches.reduce(),
            "backend": self._backend,
            "train/skipped_steps": float(skipped),
            "grad_norm": outcome.grad_norm,
            "lr": outcome.lr,
        }

    def forward(
        self, chunk: torch.nn.Module, batch: MicroBatch
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], MicroBatchLoss]]:
        """One micro-batch through one of the policy's chunks as ``run`` does it, but for routing replay, and the loss of what
        comes out of the last. Nothing of it is kept, nothing waits: for whoever asks what it takes (launch/plan).
        """
        return forward_micro_batch(batch, chunk, partial(self._loss_of, _StepParts(())), self._rollout_weights)

    def _checked_mismatch(self, parts: Sequence[MetricSums]) -> dict[str, float]:
        """How far policy and engine are apart. ``parts``: of one optimizer step; empty but on the last pipeline stage."""
        metrics = global_metrics(MetricSums.total(parts) if parts else None)
        mismatch, limit = metrics.get("mismatch/abs_log_ratio", 0.0), self._config.algorithm.max_mismatch
        if mismatch > limit > 0:
            raise MismatchError(
                f"the mean |log pi - log mu| of these rollouts is {mismatch:.3g}, more than algorithm.max_mismatch ="
                f" {limit:g}: engine and policy do not compute the same (weights, temperature, tokenizer; for MoE policies"
                " routing, which algorithm.routing_replay makes the same). Nothing was learned from them"
            )
        return {name: value for name, value in metrics.items() if name.startswith("mismatch/")}

    def _loss_of(
        self,
        parts: _StepParts,
        batch: MicroBatch,
        hidden: torch.Tensor,
        rollout_logits: torch.Tensor | None,
    ) -> MicroBatchLoss:
        """The loss of a micro-batch from the last stage's hidden states; what it tells goes to ``parts``."""
        if batch.inputs is None:
            raise ValueError("the examples have no rollout log-probs, which the loss is anchored on")
        head = PolicyHead(self._policy.chunks[-1])
        hidden_nh = head.response_hidden(hidden, batch.rows, batch.shape)
        if self._config.train.fused_linear:
            policy: torch.Tensor | LinearHead = LinearHead(
                hidden_nh,
                head.weight,
                reduce_hidden_grad=False,  # the head does
                accumulate_into_main_grad=True,
                backward_scale=_BACKWARD_SCALE,
                fp32_logits=head.fp32_logits,
            )
        else:
            policy = head.logits(hidden_nh, self._loss.deterministic)
        output = self._loss(policy, dataclasses.replace(batch.inputs, rollout_logits=rollout_logits))
        parts.metrics.append(output.metrics)
        parts.tokens.append(TokenRecord.of(batch, output, parts.traced))
        if self._config.logging.improvement_bound:
            rollout = self._config.rollout
            most = rollout.prompts_per_step * rollout.samples_per_prompt
            parts.responses.append(ResponseSums.of(batch.inputs, output, most))
        return MicroBatchLoss(output.loss, output.num_tokens, output.checks)

    def _with_extra_log_probs(self, batch: ReplicaBatch) -> ReplicaBatch:
        """Add the reference policy's log-probs, or exchange the anchor, where the configuration asks for it."""
        examples, fields = dict(batch.examples), batch.fields
        if self._reference_weights is not None:
            with self._reference_weights.in_place():
                log_probs = self._response_log_probs(batch)
            examples = {n: dataclasses.replace(e, ref_log_probs=log_probs[n]) for n, e in examples.items()}
            fields = dataclasses.replace(fields, ref_log_probs=True)
        if self._config.algorithm.anchor == "recomputed":
            log_probs = self._response_log_probs(batch)
            examples = {n: dataclasses.replace(e, rollout_log_probs=log_probs[n]) for n, e in examples.items()}
        return dataclasses.replace(batch, examples=examples, fields=fields)

    def _response_log_probs(self, batch: ReplicaBatch) -> dict[int, torch.Tensor]:
        """[R] fp32 log-probs of each example's response under the present weights, on every rank of the replica."""
        temperature = self._config.algorithm.loss.temperature

        def log_probs(micro_batch: MicroBatch, hidden: torch.Tensor) -> torch.Tensor:
            return response_log_probs(self._policy, self._config.train, micro_batch, hidden, temperature)

        result: dict[int, torch.Tensor] = {}
        for step in range(len(batch.steps)):
            micro_batches = self._batcher.micro_batches(batch, step)
            values = forward_only(self._policy, micro_batches, log_probs, self._replay)
            for micro_batch, whole in zip(micro_batches, values, strict=True):
                for number, (row, start) in zip(micro_batch.example_indices, micro_batch.layout.places, strict=True):
                    if number != PADDING:
                        result[number] = whole[row, start:][batch.examples[number].response_slice].clone()
        return result
