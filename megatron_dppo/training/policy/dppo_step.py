"""The update phase of one training step: several optimizer steps of the DPPO loss on one rollout batch.

The first step of a batch is on-policy up to the numerical mismatch between training and serving; the later ones move
away from the policy that generated the samples, and there the trust region matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from megatron.core import parallel_state

from megatron_dppo.loss.dppo_loss import DPPOLoss, LinearHead
from megatron_dppo.loss.metrics import MetricSums
from megatron_dppo.models.policy_head import PolicyHead
from megatron_dppo.models.routing_replay import RoutingReplay
from megatron_dppo.ops.backend import choose_backend
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.data.batcher import MicroBatcher
from megatron_dppo.training.data.micro_batch import PADDING, MicroBatch, TrainingExample
from megatron_dppo.training.metrics.loss import global_metrics
from megatron_dppo.training.metrics.step import BatchMetrics
from megatron_dppo.training.policy.frozen_weights import FrozenWeights
from megatron_dppo.training.policy.head_outputs import response_log_probs
from megatron_dppo.training.policy.optimizer_step import MicroBatchLoss, forward_only, optimizer_step
from megatron_dppo.training.policy.trainable import OptimizerState, TrainablePolicy


class DPPOStep:
    """Turns examples into optimizer steps and metrics. All ranks call ``run`` together."""

    def __init__(self, config: Config, policy: TrainablePolicy, optimizer_state: OptimizerState) -> None:
        self._config = config
        self._policy = policy
        self._optimizer_state = optimizer_state
        # Which kernels the loss takes: the logits have the parameters' dtype.
        self._backend = choose_backend(config.train.kernel_backend, next(policy.chunks[0].parameters()).detach()).name
        self._batcher = MicroBatcher(config.train, config.parallel)
        loss_config = config.algorithm.loss
        self._loss = DPPOLoss(
            loss_config,
            vocab_size=policy.vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            backend=config.train.kernel_backend,
            inplace_backward=True,
            # The optimizer step looks once, before it is applied; to look in every call would drain the device's queue.
            checks="deferred",
        )
        self._rollout_weights = FrozenWeights(policy.chunks) if loss_config.needs_rollout_logits else None
        # The reference policy is the one that training starts from.
        self._reference_weights = FrozenWeights(policy.chunks) if loss_config.kl_coef else None
        self._replay = RoutingReplay(policy.chunks) if config.algorithm.routing_replay else None

    def run(self, examples: Sequence[TrainingExample]) -> dict[str, float | str]:
        """Learn from this replica's examples of one rollout batch; returns global metrics.

        They are numbers but for ``backend``, which names the kernels that ran.
        """
        if self._rollout_weights is not None:
            self._rollout_weights.refresh()  # the engine samples with the weights as they are before the first step
        examples = self._with_extra_log_probs(examples)
        first: MetricSums | None = None
        every: MetricSums | None = None
        batches = BatchMetrics()
        steps = self._config.train.updates_per_rollout
        for index in range(steps):
            share = examples[index::steps]  # every step sees some of the samples of every prompt
            micro_batches = self._batcher.micro_batches(share)
            batches.add(micro_batches)
            parts: list[MetricSums] = []
            outcome = optimizer_step(
                self._policy,
                self._optimizer_state,
                micro_batches,
                partial(self._loss_of, parts),
                self._rollout_weights,
                self._replay,
            )
            if parts:  # on the last pipeline stage
                step_metrics = MetricSums.total(parts)
                first = first or step_metrics
                every = step_metrics if every is None else every + step_metrics
        on_policy = {name: value for name, value in global_metrics(first).items() if name.startswith("mismatch/")}
        replayed = {} if self._replay is None else {"mismatch/rerouted_share": self._replay.replayed_differently()}
        return {
            **global_metrics(every),
            **on_policy,
            **replayed,
            **batches.reduce(),
            "backend": self._backend,
            "grad_norm": outcome.grad_norm,
            "lr": outcome.lr,
        }

    def _loss_of(
        self, parts: list[MetricSums], batch: MicroBatch, hidden: torch.Tensor, rollout_logits: torch.Tensor | None
    ) -> MicroBatchLoss:
        """The loss of a micro-batch from the last stage's hidden states; its metrics go to ``parts``."""
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
            )
        else:
            policy = head.logits(hidden_nh)
        output = self._loss(policy, dataclasses.replace(batch.inputs, rollout_logits=rollout_logits))
        parts.append(output.metrics)
        return MicroBatchLoss(output.loss, output.num_tokens, output.checks)

    def _with_extra_log_probs(self, examples: Sequence[TrainingExample]) -> Sequence[TrainingExample]:
        """Add the reference policy's log-probs, or exchange the anchor, where the configuration asks for it."""
        if self._reference_weights is not None:
            with self._reference_weights.in_place():
                log_probs = self._response_log_probs(examples)
            examples = [dataclasses.replace(e, ref_log_probs=lp) for e, lp in zip(examples, log_probs, strict=True)]
        if self._config.algorithm.anchor == "recomputed":
            log_probs = self._response_log_probs(examples)
            examples = [dataclasses.replace(e, rollout_log_probs=lp) for e, lp in zip(examples, log_probs, strict=True)]
        return examples

    def _response_log_probs(self, examples: Sequence[TrainingExample]) -> list[torch.Tensor]:
        """[R] fp32 log-probs of each example's response under the present weights, on every rank of the replica."""
        temperature = self._config.algorithm.loss.temperature

        def log_probs(batch: MicroBatch, hidden: torch.Tensor) -> torch.Tensor:
            return response_log_probs(self._policy, self._config.train, batch, hidden, temperature)

        micro_batches = self._batcher.micro_batches(examples)
        result: list[torch.Tensor] = [torch.empty(0)] * len(examples)
        values = forward_only(self._policy, micro_batches, log_probs, self._replay)
        for batch, whole in zip(micro_batches, values, strict=True):
            for index, (row, start) in zip(batch.example_indices, batch.layout.places, strict=True):
                if index != PADDING:
                    result[index] = whole[row, start:][examples[index].response_slice].clone()
        return result
