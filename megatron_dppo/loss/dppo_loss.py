"""The DPPO loss: sharded logits and rollout log-probs in, a scalar to call ``backward`` on out.

The page to read first. Per token, with mu and pi the sampled token's probability under the rollout policy and the
policy being trained, and r = pi / mu (2602.04879, Eq. 11-12):

    loss = -w r A,  gradient  -w r A grad(log pi)

where the weight w is 0 for updates that leave the trust region, i.e. that lead outward although D(mu || pi) > delta
already. ``loss/objective.py`` computes w r A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dppo.errors import LossInputError
from megatron_dppo.loss import metrics
from megatron_dppo.loss.aggregation import Aggregation, aggregation_of
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.divergences import sampled_slot_valid
from megatron_dppo.loss.fused_objective import fused_token_update
from megatron_dppo.loss.inputs import TokenBatch, select_tokens
from megatron_dppo.loss.objective import token_update
from megatron_dppo.loss.regularisers import differentiable_zero, reference_kl
from megatron_dppo.ops.backend import backend_in_use
from megatron_dppo.ops.exact_divergence import KnownProbabilities, vocab_parallel_divergence
from megatron_dppo.ops.fused_linear import fused_linear_policy_stats
from megatron_dppo.ops.policy_stats import PolicyStats, locate_shard, vocab_parallel_policy_stats
from megatron_dppo.ops.torch_backend import compute_dtype


@dataclass(frozen=True)
class LossOutput:
    """What one call of the loss returns.

    Attributes:
        loss: scalar with gradient, summed over local tokens; divide by the global sum of ``num_tokens``.
        num_tokens: scalar int64, this call's share of the denominator (see ``loss/aggregation.py``).
        metrics: {name: (numerator, denominator)}, detached fp64 scalars, to be summed over ranks and micro-batches.
        extrema: {name: scalar}, to be max-reduced.
        divergence_histogram: int64 counts, to be summed.
        weight: [...] fp32 trust-region weight per token, 0 outside the mask, detached.
        divergence: [...] fp32 D(mu || pi) per token, 0 outside the mask, detached.
        backend: which kernels ran: cuda | cpu | torch.
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    metrics: metrics.Metrics
    extrema: dict[str, torch.Tensor]
    divergence_histogram: torch.Tensor
    weight: torch.Tensor
    divergence: torch.Tensor
    backend: str


class DPPOLoss:
    """The loss of ``config``: call it with logits, or ``from_hidden`` with what the output layer would turn into logits.

    Both take the same per-token inputs, [...] standing for the tokens' shape, and raise LossInputError where one is
    missing, misshapen or holds an impossible value at a masked-in token. All ranks of ``tp_group`` pass the same tokens.

        target: [...] int64 global ids of the sampled tokens, aligned with the logits that predict them.
        loss_mask: [...] bool or 0/1: response tokens. Nothing outside is read.
        advantages: [...] fp32.
        rollout_log_probs: [...] fp32 log-probs that the serving engine reported for ``target`` at
            ``config.temperature``; up to rounding above 0 is taken as 0.
        rollout_topk_ids: [..., K] int64 global ids of the engine's top K; for topk_*, and better predictive directions.
        rollout_topk_log_probs: [..., K] fp32.
        ref_log_probs: [...] fp32 of a reference policy; needed if ``kl_coef`` is not 0.
        sequence_ids: [...] int64 sequence of each token; for per-sequence aggregation of packed [n] tokens.
        sequence_lengths: [...] int64 whole masked-in length of the token's sequence, if split over ranks.
        sequence_starts: [...] bool, True at a sequence's first masked-in token, if split over ranks.
        backend: auto | cuda | cpu | torch.

    Args:
        config: what is optimised.
        tp_group: tensor-parallel group that the vocabulary is sharded over; None: logits are whole.
        vocab_size: true size of the whole vocabulary; None: there are no padded columns.
    """

    def __init__(
        self, config: DPPOConfig, tp_group: dist.ProcessGroup | None = None, vocab_size: int | None = None
    ) -> None:
        self.config = config
        self.tp_group = tp_group
        self.vocab_size = vocab_size

    def __call__(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        loss_mask: torch.Tensor,
        advantages: torch.Tensor,
        rollout_log_probs: torch.Tensor,
        rollout_topk_ids: torch.Tensor | None = None,
        rollout_topk_log_probs: torch.Tensor | None = None,
        rollout_logits: torch.Tensor | None = None,
        ref_log_probs: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        sequence_lengths: torch.Tensor | None = None,
        sequence_starts: torch.Tensor | None = None,
        inplace_backward: bool = False,
        backend: str = "auto",
    ) -> LossOutput:
        """Loss, metrics and per-token weights from logits; the class describes the inputs that are not listed here.

        Args:
            logits: [b, s, V/TP] or [n, V/TP], bf16, fp16 or fp32.
            rollout_logits: [..., V/TP] of the rollout weights, recomputed; for exact_*. With the top K given too, the
                engine's probabilities are used where it reported them, and the recomputed ones elsewhere.
            inplace_backward: overwrite the logits with their gradient.
        """
        self._check_inputs(rollout_topk_ids, ref_log_probs)
        topk = (rollout_topk_ids, rollout_topk_log_probs)
        tokens = select_tokens(
            logits.shape[:-1],
            compute_dtype(logits),
            target,
            loss_mask,
            advantages,
            rollout_log_probs,
            *topk,
            ref_log_probs,
        )
        aggregation = aggregation_of(self.config, tokens, sequence_ids, sequence_lengths, sequence_starts)
        exact = self._exact_divergence(tokens, logits, rollout_logits, backend)
        stats = vocab_parallel_policy_stats(
            logits,
            target,
            topk_ids=rollout_topk_ids if self._reads_topk else None,
            temperature=self.config.temperature,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            token_mask=tokens.mask,
            inplace_backward=inplace_backward,
            backend=backend,
        )
        vocab_size = locate_shard(logits, self.vocab_size, self.tp_group).vocab_size
        return self._from_stats(tokens, aggregation, stats, exact, vocab_size, backend_in_use(backend, logits))

    def from_hidden(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        loss_mask: torch.Tensor,
        advantages: torch.Tensor,
        rollout_log_probs: torch.Tensor,
        rollout_topk_ids: torch.Tensor | None = None,
        rollout_topk_log_probs: torch.Tensor | None = None,
        ref_log_probs: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        sequence_lengths: torch.Tensor | None = None,
        sequence_starts: torch.Tensor | None = None,
        reduce_hidden_grad: bool = True,
        accumulate_into_main_grad: bool = False,
        sequence_parallel: bool = False,
        backend: str = "auto",
    ) -> LossOutput:
        """The same from hidden states and the output layer's weight; the logits never exist as a whole.

        Args:
            hidden: [..., h]; with ``sequence_parallel`` this rank's [s/TP, ..., h] of tokens [s, ...].
            weight: [V/TP, h] of the output layer.
            reduce_hidden_grad: sum the gradient of ``hidden`` over ``tp_group``. False: the caller does.
            accumulate_into_main_grad: add the weight's gradient to its ``main_grad`` (see ``ops/fused_linear.py``).
            sequence_parallel: ``hidden`` is sharded along its first dimension over ``tp_group``.
        """
        if self.config.divergence.startswith("exact"):
            raise LossInputError(
                f"divergence={self.config.divergence!r} compares whole distributions and needs logits: call the loss with "
                "logits and rollout_logits, or choose a binary or top-K divergence"
            )
        self._check_inputs(rollout_topk_ids, ref_log_probs)
        shards = 1 if self.tp_group is None else dist.get_world_size(self.tp_group)
        shape = hidden.shape[:-1]
        if sequence_parallel:
            shape = torch.Size((shape[0] * shards, *shape[1:]))
        topk = (rollout_topk_ids, rollout_topk_log_probs)
        tokens = select_tokens(
            shape, compute_dtype(hidden), target, loss_mask, advantages, rollout_log_probs, *topk, ref_log_probs
        )
        aggregation = aggregation_of(self.config, tokens, sequence_ids, sequence_lengths, sequence_starts)
        stats = fused_linear_policy_stats(
            hidden,
            weight,
            target,
            topk_ids=rollout_topk_ids if self._reads_topk else None,
            temperature=self.config.temperature,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            token_mask=tokens.mask,
            sequence_parallel=sequence_parallel,
            reduce_hidden_grad=reduce_hidden_grad,
            accumulate_into_main_grad=accumulate_into_main_grad,
            backend=backend,
        )
        vocab_size = self.vocab_size or weight.shape[0] * shards
        return self._from_stats(tokens, aggregation, stats, None, vocab_size, backend_in_use(backend, hidden))

    def _from_stats(
        self,
        tokens: TokenBatch,
        aggregation: Aggregation,
        stats: PolicyStats,
        exact_divergence: torch.Tensor | None,
        vocab_size: int,
        backend: str,
    ) -> LossOutput:
        """What both ways share: from statistics of the policy, however they were come by, to the output."""
        log_prob, entropy = tokens.select(stats.log_prob), tokens.select(stats.entropy)
        policy = PolicyStats(
            log_prob.detach(),
            entropy.detach(),
            tokens.select(stats.collision),
            # Without top-K ids, or where nothing reads them, K columns of anything do.
            tokens.topk_log_probs if stats.topk_log_prob is None else tokens.select(stats.topk_log_prob),
        )
        judge = token_update if backend == "torch" else fused_token_update
        update = judge(self.config, tokens, policy, exact_divergence, vocab_size)
        # Value -w r A, gradient -w r A grad(log pi): the coefficient is a constant to autograd.
        per_token = -update.coefficient * (1.0 + differentiable_zero(log_prob))
        penalty, reported = self._penalty(log_prob, entropy, tokens)
        loss = (aggregation.weights * (per_token + penalty)).sum()
        reported["loss"] = (loss.detach().double(), aggregation.num_tokens.double())
        return LossOutput(
            loss=loss,
            num_tokens=aggregation.num_tokens,
            metrics=reported | update.metrics,
            extrema=update.extrema,
            divergence_histogram=update.divergence_histogram,
            weight=tokens.spread(update.weight),
            divergence=tokens.spread(update.divergence),
            backend=backend,
        )

    @property
    def _reads_topk(self) -> bool:
        return self.config.divergence.startswith("topk") or self.config.direction == "predictive"

    def _check_inputs(self, rollout_topk_ids: torch.Tensor | None, ref_log_probs: torch.Tensor | None) -> None:
        if self.config.divergence.startswith("topk") and rollout_topk_ids is None:
            raise LossInputError(
                f"divergence={self.config.divergence!r} needs rollout_topk_ids and rollout_topk_log_probs: "
                "have the engine return top-K log-probs"
            )
        if self.config.kl_coef != 0.0 and ref_log_probs is None:
            raise LossInputError("kl_coef is not 0, which needs ref_log_probs")

    def _penalty(
        self, log_prob: torch.Tensor, entropy: torch.Tensor, tokens: TokenBatch
    ) -> tuple[torch.Tensor, metrics.Metrics]:
        """[n] entropy bonus and reference KL, and what to report of them. Both carry gradient."""
        penalty = torch.zeros_like(tokens.advantages)
        if self.config.entropy_coef != 0.0:
            penalty = penalty - self.config.entropy_coef * entropy
        if tokens.ref_log_probs is None:
            return penalty, {}
        kl = reference_kl(log_prob, tokens.ref_log_probs, self.config.kl_estimator)
        if self.config.kl_coef != 0.0:
            penalty = penalty + self.config.kl_coef * kl
        return penalty, {"reference/kl": metrics.mean_metric(kl.detach())}

    def _exact_divergence(
        self, tokens: TokenBatch, logits: torch.Tensor, rollout_logits: torch.Tensor | None, backend: str
    ) -> torch.Tensor | None:
        """[n] D over the whole vocabulary; None if the configured divergence is another."""
        partition, kind = self.config.divergence.split("_")
        if partition != "exact":
            return None
        if rollout_logits is None:
            raise LossInputError(
                f"divergence={self.config.divergence!r} needs rollout_logits: "
                "a forward pass with the weights that generated the tokens"
            )
        return vocab_parallel_divergence(
            "tv" if kind == "tv" else "kl",
            logits.detach(),
            rollout_logits,
            tokens.mask,
            known=_engine_probabilities(tokens),
            temperature=self.config.temperature,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            backend=backend,
        )


def _engine_probabilities(tokens: TokenBatch) -> KnownProbabilities | None:
    """What the serving engine reported, for the hybrid exact divergence; None without its top K."""
    if tokens.topk_ids.shape[1] == 0:
        return None
    return KnownProbabilities(
        ids=torch.cat([tokens.topk_ids, tokens.target[:, None]], dim=1),
        log_prob=torch.cat([tokens.topk_log_probs, tokens.rollout_log_probs[:, None]], dim=1),
        valid=sampled_slot_valid(tokens.topk_ids, tokens.target),
    )
