"""The DPPO loss: sharded logits and rollout log-probs in, a scalar to call ``backward`` on out.

The page to read first. Per token, with mu and pi the sampled token's probability under the rollout policy and the
policy being trained, and r = pi / mu (2602.04879, Eq. 11-12):

    loss = -w r A,  gradient  -w r A grad(log pi)

where the weight w is 0 for updates that leave the trust region, i.e. that lead outward although D(mu || pi) > delta
already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dppo.loss import divergences, metrics
from megatron_dppo.loss.aggregation import aggregation_of
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.direction import predictive_direction, ratio_direction
from megatron_dppo.loss.regularisers import differentiable_zero, reference_kl
from megatron_dppo.loss.token_batch import LossInputError, TokenBatch, select_tokens
from megatron_dppo.loss.trust_region import token_weight
from megatron_dppo.ops.exact_divergence import KnownProbabilities, vocab_parallel_divergence
from megatron_dppo.ops.policy_stats import PolicyStats, locate_shard, vocab_parallel_policy_stats

_LOG_RATIO_CLAMP = 20.0  # exp() must not overflow; not a trust region


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
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    metrics: metrics.Metrics
    extrema: dict[str, torch.Tensor]
    divergence_histogram: torch.Tensor
    weight: torch.Tensor
    divergence: torch.Tensor


class DPPOLoss:
    """The loss of ``config``, for logits over one vocabulary.

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
        """Compute loss, metrics and per-token weights. All ranks of ``tp_group`` pass the same tokens.

        Args:
            logits: [b, s, V/TP] or [n, V/TP], bf16, fp16 or fp32. "[...]" below stands for the shape without V.
            target: [...] int64 global ids of the sampled tokens, aligned with the logits that predict them.
            loss_mask: [...] bool or 0/1: response tokens. Nothing outside is read.
            advantages: [...] fp32.
            rollout_log_probs: [...] fp32 log-probs that the serving engine reported for ``target`` at
                ``config.temperature``; up to rounding above 0 is taken as 0.
            rollout_topk_ids: [..., K] int64 global ids of the engine's top K; for topk_*, and better predictive
                directions.
            rollout_topk_log_probs: [..., K] fp32.
            rollout_logits: [..., V/TP] of the rollout weights, recomputed; for exact_*. With the top K given too, the
                engine's probabilities are used where it reported them, and the recomputed ones elsewhere.
            ref_log_probs: [...] fp32 of a reference policy; needed if ``kl_coef`` is not 0.
            sequence_ids: [...] int64 sequence of each token; for per-sequence aggregation of packed [n, V/TP] logits.
            sequence_lengths: [...] int64 whole masked-in length of the token's sequence, if split over ranks.
            sequence_starts: [...] bool, True at a sequence's first masked-in token, if split over ranks.
            inplace_backward: overwrite the logits with their gradient.
            backend: auto | cuda | cpu | torch.

        Raises:
            LossInputError: an input is missing, misshapen or holds an impossible value at a masked-in token.
        """
        config = self.config
        self._check_inputs(rollout_topk_ids, rollout_logits, ref_log_probs)
        tokens = select_tokens(
            logits,
            target,
            loss_mask,
            advantages,
            rollout_log_probs,
            rollout_topk_ids,
            rollout_topk_log_probs,
            ref_log_probs,
        )
        stats = vocab_parallel_policy_stats(
            logits,
            target,
            topk_ids=rollout_topk_ids if self._reads_topk else None,
            temperature=config.temperature,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            token_mask=tokens.mask,
            inplace_backward=inplace_backward,
            backend=backend,
        )
        log_prob, entropy = tokens.select(stats.log_prob), tokens.select(stats.entropy)

        # How far is the policy, which way does the update lead, and what is it worth?
        log_mu, log_pi = tokens.rollout_log_probs, log_prob.detach()
        log_ratio = log_pi - log_mu
        ratio = log_ratio.clamp(-_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP).exp()
        capped_ratio = ratio if config.ratio_cap is None else ratio.clamp(max=config.ratio_cap)
        mu, pi = log_mu.exp(), log_pi.exp()
        known = self._known_tokens(tokens, stats, log_pi)
        divergence = self._divergence(tokens, log_pi, known, logits, rollout_logits, backend)
        outward = self._outward(
            tokens, stats, log_pi, known, locate_shard(logits, self.vocab_size, self.tp_group).vocab_size
        )
        weight = token_weight(config, tokens.advantages, log_ratio, capped_ratio, pi - mu, divergence, outward)

        # Value -w r A, gradient -w r A grad(log pi): the coefficient is a constant to autograd.
        per_token = -(weight * capped_ratio * tokens.advantages) * (1.0 + differentiable_zero(log_prob))
        penalty, reported = self._penalty(log_prob, entropy, tokens)
        aggregation = aggregation_of(config, tokens, sequence_ids, sequence_lengths, sequence_starts)
        loss = (aggregation.weights * (per_token + penalty)).sum()
        reported.update(metrics.batch_metrics(loss.detach(), aggregation, entropy.detach()))
        reported.update(metrics.trust_region_metrics(tokens.advantages, log_ratio, mu, pi, divergence, weight))
        reported.update(metrics.mismatch_metrics(log_ratio, ratio))
        return LossOutput(
            loss=loss,
            num_tokens=aggregation.num_tokens,
            metrics=reported,
            extrema=metrics.extrema_of(tokens.advantages, ratio, pi - mu, divergence),
            divergence_histogram=metrics.divergence_histogram(tokens.advantages, divergence),
            weight=tokens.spread(weight),
            divergence=tokens.spread(divergence),
        )

    @property
    def _reads_topk(self) -> bool:
        return self.config.divergence.startswith("topk") or self.config.direction == "predictive"

    def _check_inputs(
        self,
        rollout_topk_ids: torch.Tensor | None,
        rollout_logits: torch.Tensor | None,
        ref_log_probs: torch.Tensor | None,
    ) -> None:
        divergence = self.config.divergence
        if divergence.startswith("topk") and rollout_topk_ids is None:
            raise LossInputError(
                f"divergence={divergence!r} needs rollout_topk_ids and rollout_topk_log_probs: "
                "have the engine return top-K log-probs"
            )
        if divergence.startswith("exact") and rollout_logits is None:
            raise LossInputError(
                f"divergence={divergence!r} needs rollout_logits: "
                "a forward pass with the weights that generated the tokens"
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

    def _known_tokens(
        self, tokens: TokenBatch, stats: PolicyStats, log_pi: torch.Tensor
    ) -> divergences.KnownTokens | None:
        if not self._reads_topk:
            return None
        topk_log_pi = tokens.topk_log_probs if stats.topk_log_prob is None else tokens.select(stats.topk_log_prob)
        return divergences.known_tokens(
            tokens.rollout_log_probs, log_pi, tokens.target, tokens.topk_ids, tokens.topk_log_probs, topk_log_pi
        )

    def _divergence(
        self,
        tokens: TokenBatch,
        log_pi: torch.Tensor,
        known: divergences.KnownTokens | None,
        logits: torch.Tensor,
        rollout_logits: torch.Tensor | None,
        backend: str,
    ) -> torch.Tensor:
        partition, kind = self.config.divergence.split("_")
        if partition == "binary":
            binary = divergences.binary_tv if kind == "tv" else divergences.binary_kl
            return binary(tokens.rollout_log_probs, log_pi)
        if known is not None and partition == "topk":
            return divergences.topk_tv(known) if kind == "tv" else divergences.topk_kl(known)
        assert rollout_logits is not None  # _check_inputs
        return vocab_parallel_divergence(
            "tv" if kind == "tv" else "kl",
            logits.detach(),
            rollout_logits,
            tokens.mask,
            known=self._engine_probabilities(tokens),
            temperature=self.config.temperature,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            backend=backend,
        )

    def _engine_probabilities(self, tokens: TokenBatch) -> KnownProbabilities | None:
        """What the serving engine reported, for the hybrid exact divergence; None without its top K."""
        if tokens.topk_ids.shape[1] == 0:
            return None
        return KnownProbabilities(
            ids=torch.cat([tokens.topk_ids, tokens.target[:, None]], dim=1),
            log_prob=torch.cat([tokens.topk_log_probs, tokens.rollout_log_probs[:, None]], dim=1),
            valid=divergences.sampled_slot_valid(tokens.topk_ids, tokens.target),
        )

    def _outward(
        self,
        tokens: TokenBatch,
        stats: PolicyStats,
        log_pi: torch.Tensor,
        known: divergences.KnownTokens | None,
        vocab_size: int,
    ) -> torch.Tensor:
        log_mu = tokens.rollout_log_probs
        if self.config.direction == "ratio" or known is None:
            return ratio_direction(tokens.advantages, log_pi - log_mu)
        return predictive_direction(
            tokens.advantages,
            log_mu,
            log_pi,
            known,
            tokens.select(stats.collision),
            vocab_size,
            self.config.predictive_estimator,
        )
