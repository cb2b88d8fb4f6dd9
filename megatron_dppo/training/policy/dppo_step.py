"""The update phase of one training step: several optimizer steps of the DPPO loss on one rollout batch.

The first step of a batch is on-policy up to the numerical mismatch between training and serving; the later ones move
away from the policy that generated the samples, and there the trust region matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_dppo.loss.dppo_loss import DPPOLoss, LossOutput
from megatron_dppo.models.policy_head import PolicyHead
from megatron_dppo.models.routing_replay import RoutingReplay
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.data.batcher import MicroBatcher
from megatron_dppo.training.data.micro_batch import PADDING, MicroBatch, TrainingExample
from megatron_dppo.training.metrics.loss import LossMetrics
from megatron_dppo.training.metrics.step import BatchMetrics
from megatron_dppo.training.policy.frozen_weights import FrozenWeights
from megatron_dppo.training.policy.head_outputs import response_log_probs
from megatron_dppo.training.policy.optimizer_step import LossFunction, forward_only, optimizer_step
from megatron_dppo.training.policy.trainable import OptimizerState, TrainablePolicy


class DPPOUpdate:
    """Turns examples into optimizer steps and metrics. All ranks call ``run`` together."""

    def __init__(self, config: Config, policy: TrainablePolicy, optimizer_state: OptimizerState) -> None:
        self._config = config
        self._policy = policy
        self._optimizer_state = optimizer_state
        self._batcher = MicroBatcher(config.train, config.parallel)
        loss_config = config.algorithm.loss
        self._loss = DPPOLoss(loss_config, parallel_state.get_tensor_model_parallel_group(), policy.vocab_size)
        exact = loss_config.divergence.startswith("exact_")
        self._rollout_weights = FrozenWeights(policy.chunks) if exact else None
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
        first, every, batches = LossMetrics(), LossMetrics(), BatchMetrics()
        updates = self._config.train.updates_per_rollout
        for index in range(updates):
            share = examples[index::updates]  # every step sees some of the samples of every prompt
            micro_batches = self._batcher.micro_batches(share)
            batches.add(micro_batches)
            outcome = optimizer_step(
                self._policy,
                self._optimizer_state,
                micro_batches,
                partial(self._loss_function, [first, every] if index == 0 else [every]),
                self._rollout_weights,
                self._replay,
            )
        on_policy = {name: value for name, value in first.reduce().items() if name.startswith("mismatch/")}
        replayed = {} if self._replay is None else {"mismatch/rerouted_share": self._replay.replayed_differently()}
        return {
            **every.reduce(),
            **on_policy,
            **replayed,
            **batches.reduce(),
            "grad_norm": outcome.grad_norm,
            "lr": outcome.lr,
        }

    def _loss_function(
        self, collectors: Sequence[LossMetrics], batch: MicroBatch, rollout_logits: torch.Tensor | None
    ) -> LossFunction:
        def loss_function(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            output = self._loss_output(batch, hidden, rollout_logits)
            for collector in collectors:
                collector.add(output)
            return output.loss, output.num_tokens.int(), {}  # Megatron adds the counts up in int32

        return loss_function

    def _loss_output(self, batch: MicroBatch, hidden: torch.Tensor, rollout_logits: torch.Tensor | None) -> LossOutput:
        """The loss of a micro-batch from the last stage's hidden states."""
        head = PolicyHead(self._policy.chunks[-1])
        hidden_nh = head.response_hidden(hidden, batch.loss_mask)
        tokens: dict[str, Any] = batch.response_tokens()
        backend = self._config.train.kernel_backend
        if self._config.train.fused_linear:
            return self._loss.from_hidden(
                hidden_nh,
                head.weight,
                **tokens,
                reduce_hidden_grad=False,  # the head does
                accumulate_into_main_grad=True,
                backend=backend,
            )
        return self._loss(
            head.logits(hidden_nh), **tokens, rollout_logits=rollout_logits, inplace_backward=True, backend=backend
        )

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
