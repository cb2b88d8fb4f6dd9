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

from megatron_dppo.integrations.megatron_lm import make_loss_func
from megatron_dppo.loss.dppo_loss import LossOutput
from megatron_dppo.ops.policy_stats import vocab_parallel_policy_stats
from megatron_dppo.training.batch import MicroBatch, TrainingExample, make_micro_batches
from megatron_dppo.training.config import Config
from megatron_dppo.training.frozen_weights import FrozenWeights
from megatron_dppo.training.loss_metrics import LossMetrics
from megatron_dppo.training.policy import OptimizerState, TrainablePolicy
from megatron_dppo.training.update import LossFunction, forward_only, optimizer_step


class DPPOUpdate:
    """Turns examples into optimizer steps and metrics. All ranks call ``run`` together."""

    def __init__(self, config: Config, policy: TrainablePolicy, optimizer_state: OptimizerState) -> None:
        self._config = config
        self._loss_config = config.algorithm.loss
        self._policy = policy
        self._optimizer_state = optimizer_state
        exact = self._loss_config.divergence.startswith("exact_")
        self._rollout_weights = FrozenWeights(policy.chunks) if exact else None
        # The reference policy is the one that training starts from.
        self._reference_weights = FrozenWeights(policy.chunks) if self._loss_config.kl_coef else None

    def run(self, examples: Sequence[TrainingExample]) -> dict[str, float]:
        """Learn from this replica's examples of one rollout batch; returns global metrics."""
        if self._rollout_weights is not None:
            self._rollout_weights.refresh()  # the engine samples with the weights as they are before the first step
        examples = self._with_extra_log_probs(examples)
        first, every = LossMetrics(), LossMetrics()
        updates = self._config.train.updates_per_rollout
        for index in range(updates):
            share = examples[index::updates]  # every step sees some of the samples of every prompt
            collectors = [first, every] if index == 0 else [every]
            outcome = optimizer_step(
                self._policy,
                self._optimizer_state,
                self._micro_batches(share),
                partial(self._loss_function, collectors),
                self._rollout_weights,
            )
        on_policy = {name: value for name, value in first.reduce().items() if name.startswith("mismatch/")}
        return {**every.reduce(), **on_policy, "grad_norm": outcome.grad_norm, "lr": outcome.lr}

    def _loss_function(self, collectors: Sequence[LossMetrics], batch: MicroBatch) -> LossFunction:
        def collect(output: LossOutput) -> None:
            for collector in collectors:
                collector.add(output)

        return make_loss_func(
            self._loss_config,
            batch,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            vocab_size=self._policy.vocab_size,
            inplace_backward=True,
            collect=collect,
        )

    def _micro_batches(self, examples: Sequence[TrainingExample]) -> list[MicroBatch]:
        return make_micro_batches(
            examples,
            self._config.train.micro_batch_size,
            length_multiple=self._config.parallel.tensor_model_parallel_size,
            equal_shapes=self._config.parallel.pipeline_model_parallel_size > 1,
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

        def log_probs(batch: MicroBatch, logits: torch.Tensor) -> torch.Tensor:
            stats = vocab_parallel_policy_stats(
                logits,
                batch.target,
                temperature=self._loss_config.temperature,
                vocab_size=self._policy.vocab_size,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                token_mask=batch.loss_mask,
            )
            return stats.log_prob.cpu()

        batches = self._micro_batches(examples)
        result: list[torch.Tensor] = [torch.empty(0)] * len(examples)
        for batch, rows in zip(batches, forward_only(self._policy, batches, log_probs), strict=True):
            for index, row in zip(batch.example_indices, rows, strict=True):
                result[index] = row[examples[index].response_slice]
        return result
