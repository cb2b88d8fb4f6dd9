"""The DPPO loss: sharded logits and rollout log-probs in, a scalar to call ``backward`` on out.

The page to read first. Per token, with mu and pi the sampled token's probability under the rollout policy and the
policy being trained, and r = pi / mu (2602.04879, Eq. 11-12):

    loss = -w r A,  gradient  -w r A grad(log pi)

where the weight w is 0 for updates that leave the trust region, i.e. that lead outward although D(mu || pi) > delta
already. ``loss/objective.py`` computes w r A.

Nothing waits for the device, however many tokens the mask leaves: all of them are computed, those outside count 0. The one
exception is ``checks="now"``, which looks at the record of impossible inputs before it returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_dppo.errors import LossInputError
from megatron_dppo.loss.aggregation import Aggregation, aggregation_of
from megatron_dppo.loss.checks import CHECKS, InputChecks, check_values
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.divergences import sampled_slot_valid
from megatron_dppo.loss.fused_objective import objective_of
from megatron_dppo.loss.inputs import FlatTokens, LossInputs, check_fields, flatten
from megatron_dppo.loss.linear_head import LinearHead
from megatron_dppo.loss.metrics import LOSS, MetricSums
from megatron_dppo.loss.objective import TokenObjective
from megatron_dppo.loss.one_pass import in_one_pass
from megatron_dppo.loss.regularisers import policy_loss, reference_kl, scored
from megatron_dppo.ops.backend import Backend, choose_backend
from megatron_dppo.ops.exact_divergence import KnownProbabilities, vocab_parallel_divergence
from megatron_dppo.ops.policy_stats import PolicyStats, vocab_parallel_policy_stats
from megatron_dppo.ops.tile_tree import Deterministic, deterministic_choice
from megatron_dppo.ops.torch_backend import compute_dtype


@dataclass(frozen=True)
class LossOutput:
    """What one call of the loss returns. Everything is on the device; reading a value waits for it.

    Attributes:
        loss: scalar with gradient, summed over local tokens; divide by the global sum of ``num_tokens``.
        num_tokens: scalar int64, this call's share of the denominator (see ``loss/aggregation.py``).
        metrics: to be added up over micro-batches and ranks, then finalised.
        weight: [...] fp32 trust-region weight per token, 0 outside the mask, detached.
        divergence: [...] fp32 D(mu || pi) per token, 0 outside the mask, detached.
        log_prob: [...] fp32 log pi of the target, 0 outside the mask, detached.
        backend: which kernels ran: cuda | cpu | torch.
        checks: what is wrong with the inputs, to be looked at later; None with ``checks="off"``.
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    metrics: MetricSums
    weight: torch.Tensor
    divergence: torch.Tensor
    log_prob: torch.Tensor
    backend: str
    checks: InputChecks | None


@dataclass(frozen=True)
class _Decided:
    """The loss with its gradient, and what it was made of: [N], without gradient but for ``kl``."""

    loss: torch.Tensor
    log_prob: torch.Tensor
    objective: TokenObjective
    kl: torch.Tensor | None


class DPPOLoss:
    """The loss of ``config``: ``loss(logits, inputs)``, or ``loss(LinearHead(hidden, weight), inputs)``.

    Args:
        config: what is optimised.
        vocab_size: true size of the whole vocabulary. Megatron pads it; padded columns never count.
        tp_group: tensor-parallel group that the vocabulary is sharded over; None: logits are whole.
        backend: auto | cuda | cpu | torch.
        inplace_backward: overwrite the logits with their gradient, which saves their size in memory. Nothing else may need
            them.
        backward_scale: the number that backward will be called with on the loss, a promise: 1.0 for ``loss.backward()``, and
            for Megatron with ``calculate_per_token_loss`` and no loss scaling. With ``inplace_backward`` it lets the gradient
            be written over the logits in forward, in one pass over them (``ops/gradient_over_logits.py``), where the loss is
            a policy gradient alone, the logits are whole, and it pays (``ops/logits_route.py``): nothing may read them after
            the call. Of logits only; a LinearHead has its own. None: not known.
        checks: what happens to impossible values (an id outside the vocabulary, a log-prob that is NaN or above 0, ...).
            now: LossInputError before the call returns, for which it waits for the device. That is the default, because
            otherwise somebody has to look. deferred: they are found, and raised by ``LossOutput.checks.raise_errors()``.
            off: not looked for.
        deterministic: off | layout: log-probs and gradients are the same bits however the vocabulary is sharded, with logits
            and with a ``LinearHead``; to debug with (docs/kernels.md). Not with divergence=exact_*.
    """

    def __init__(
        self,
        config: DPPOConfig,
        *,
        vocab_size: int,
        tp_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        inplace_backward: bool = False,
        backward_scale: float | None = None,
        checks: Literal["now", "deferred", "off"] = "now",
        deterministic: Deterministic = "off",
    ) -> None:
        if deterministic_choice(deterministic) == "layout" and config.needs_rollout_logits:
            raise ValueError(
                f"deterministic='layout' does not cover divergence={config.divergence!r}, whose sum follows the shards: take "
                "a binary or top-K divergence"
            )
        if checks not in CHECKS:
            raise ValueError(f"checks must be one of {', '.join(CHECKS)}, not {checks!r}")
        if backward_scale is not None and not (inplace_backward and math.isfinite(backward_scale)):
            raise ValueError(
                f"backward_scale={backward_scale} must be a finite number, and go with inplace_backward=True: it is what "
                "lets the gradient be written over the logits in forward"
            )
        self.config = config
        self.vocab_size = vocab_size
        self.tp_group = tp_group
        self.backend = backend
        self.inplace_backward = inplace_backward
        self.backward_scale = backward_scale
        self.checks = checks
        self.deterministic = deterministic

    def __call__(self, policy: torch.Tensor | LinearHead, inputs: LossInputs) -> LossOutput:
        """Loss, metrics and per-token weights.

        Args:
            policy: [b, s, V/TP] or [n, V/TP] logits, bf16, fp16, fp32 or fp64; or what they would be made of.
            inputs: one value of each field for every token of ``policy``.

        Raises:
            LossInputError: a field is missing, misshapen or (``checks="now"``) holds an impossible value.
            BackendUnavailableError: the backend asked for cannot be used.
        """
        features = policy.hidden if isinstance(policy, LinearHead) else policy
        backend, dtype = choose_backend(self.backend, features), compute_dtype(features)
        check_fields(self.config, inputs, self._tokens_shape(policy))
        tokens = flatten(self.config, inputs, dtype)
        aggregation = aggregation_of(self.config, inputs, tokens)
        checks = None
        if self.checks != "off":
            checks = check_values(inputs, tokens, self.vocab_size, aggregation.local_lengths, backend)
        decided = self._in_forward(policy, tokens, aggregation, backend)
        if decided is None:
            decided = self._by_autograd(policy, inputs, tokens, aggregation, backend)
        objective = decided.objective
        num_tokens = objective.num_tokens if aggregation.num_tokens is None else aggregation.num_tokens
        metrics = objective.metrics
        if not self._is_policy_loss(aggregation):
            metrics = metrics.without_means(LOSS).with_means({LOSS: (decided.loss, num_tokens)})
        if decided.kl is not None:
            metrics = metrics.with_means({"reference/kl": (decided.kl.double().sum(), objective.num_tokens)})

        shape = inputs.target.shape
        output = LossOutput(
            loss=decided.loss,
            num_tokens=num_tokens,
            metrics=metrics,
            weight=objective.weight.view(shape),
            divergence=objective.divergence.view(shape),
            log_prob=decided.log_prob.view(shape),
            backend=backend.name,
            checks=checks,
        )
        if checks is not None and self.checks == "now":
            checks.raise_errors()
        return output

    def _tokens_shape(self, policy: torch.Tensor | LinearHead) -> torch.Size:
        """[...] of the tokens that ``policy`` stands for."""
        if not isinstance(policy, LinearHead):
            return policy.shape[:-1]
        if self.config.needs_rollout_logits:
            raise LossInputError(
                f"divergence={self.config.divergence!r} compares whole distributions and needs logits: call the loss with "
                "logits and rollout_logits, or choose a binary or top-K divergence"
            )
        shape = policy.hidden.shape[:-1]
        if policy.sequence_parallel and self.tp_group is not None:
            shape = torch.Size((shape[0] * dist.get_world_size(self.tp_group), *shape[1:]))
        return shape

    def _in_forward(
        self, policy: torch.Tensor | LinearHead, tokens: FlatTokens, aggregation: Aggregation, backend: Backend
    ) -> _Decided | None:
        """With the gradient made as soon as a token's statistics are known; None where that cannot be, or does not pay."""
        if self.config.entropy_coef != 0.0 or self.config.kl_coef != 0.0:
            return None
        if isinstance(policy, LinearHead):
            made = self._by_blocks(policy, tokens, aggregation, backend)
        elif self.backward_scale is not None and self.deterministic == "off":  # rows are reduced in another order there
            made = in_one_pass(
                self.config,
                policy,
                tokens,
                aggregation,
                vocab_size=self.vocab_size,
                tp_group=self.tp_group,
                backward_scale=self.backward_scale,
                backend=backend,
            )
        else:
            made = None
        if made is None:
            return None
        zero, log_prob, objective = made
        kl = None
        if tokens.ref_log_probs is not None:
            kl = reference_kl(log_prob, tokens.masked(tokens.ref_log_probs), self.config.kl_estimator)
        loss = objective.loss if self._is_policy_loss(aggregation) else aggregation.sum(-objective.coefficient)
        return _Decided(loss + zero, log_prob, objective, kl)

    def _by_blocks(
        self, policy: LinearHead, tokens: FlatTokens, aggregation: Aggregation, backend: Backend
    ) -> tuple[torch.Tensor, torch.Tensor, TokenObjective] | None:
        """Scalar 0 with the gradient, log-probs, objective: from hidden states, a block of tokens at a time."""
        block_rows = policy.rows_of_a_block(tokens.target.shape[0])
        if block_rows is None:
            return None

        def decide(tokens: FlatTokens, stats: PolicyStats) -> TokenObjective:
            return objective_of(backend)(self.config, tokens, stats, None, self.vocab_size)

        return policy.policy_gradient(
            tokens=tokens,
            aggregation=aggregation,
            decide=decide,
            block_rows=block_rows,
            **self._arguments(policy, tokens),
        )

    def _by_autograd(
        self,
        policy: torch.Tensor | LinearHead,
        inputs: LossInputs,
        tokens: FlatTokens,
        aggregation: Aggregation,
        backend: Backend,
    ) -> _Decided:
        """With everything that carries gradient differentiated by autograd."""
        arguments = self._arguments(policy, tokens)
        if isinstance(policy, LinearHead):
            stats = policy.policy_stats(**arguments).flatten()
        else:
            stats = vocab_parallel_policy_stats(policy, **arguments, inplace_backward=self.inplace_backward).flatten()
        exact_divergence = self._exact_divergence(policy, inputs, tokens)
        objective = objective_of(backend)(self.config, tokens, stats.detach(), exact_divergence, self.vocab_size)
        kl = None
        if tokens.ref_log_probs is not None:
            kl = reference_kl(stats.log_prob, tokens.masked(tokens.ref_log_probs), self.config.kl_estimator)
        # Value -w r A, gradient -w r A grad(log pi): the coefficient is a constant to autograd.
        if self._is_policy_loss(aggregation):
            loss = policy_loss(objective.loss, objective.coefficient, stats.log_prob)
        else:
            per_token = scored(objective.coefficient, stats.log_prob, -1.0)
            loss = aggregation.sum(self._with_penalties(per_token, stats.entropy, kl))
        return _Decided(loss, stats.log_prob.detach(), objective, kl)

    def _is_policy_loss(self, aggregation: Aggregation) -> bool:
        """Whether the loss is the sum of -w r A over the tokens, which the objective comes with."""
        return aggregation.token_weights is None and self.config.entropy_coef == 0.0 and self.config.kl_coef == 0.0

    def _arguments(self, policy: torch.Tensor | LinearHead, tokens: FlatTokens) -> dict[str, Any]:
        """Of the operators that compute the policy's statistics, for logits and for hidden states."""
        shape = self._tokens_shape(policy)
        topk_ids = tokens.topk_ids if self.config.needs_topk else None

        def shaped(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.view(*shape, *values.shape[1:])

        arguments = {
            "target": tokens.target.view(shape),
            "topk_ids": shaped(topk_ids),
            "temperature": self.config.temperature,
            "vocab_size": self.vocab_size,
            "tp_group": self.tp_group,
            "token_mask": shaped(tokens.mask),
            "backend": self.backend,
            "deterministic": self.deterministic,
            "checks": "off",  # check_values has looked
        }
        return arguments | {"rows": None} if isinstance(policy, LinearHead) else arguments

    def _with_penalties(self, per_token: torch.Tensor, entropy: torch.Tensor, kl: torch.Tensor | None) -> torch.Tensor:
        """[N] with the entropy bonus and the KL to the reference policy; both are 0 outside the mask."""
        if self.config.entropy_coef != 0.0:
            per_token = per_token - self.config.entropy_coef * entropy
        if self.config.kl_coef != 0.0 and kl is not None:
            per_token = per_token + self.config.kl_coef * kl
        return per_token

    def _exact_divergence(
        self, policy: torch.Tensor | LinearHead, inputs: LossInputs, tokens: FlatTokens
    ) -> torch.Tensor | None:
        """[N] D over the whole vocabulary; None if the configured divergence is another."""
        if not self.config.needs_rollout_logits or isinstance(policy, LinearHead):
            return None
        assert inputs.rollout_logits is not None  # check_fields
        return vocab_parallel_divergence(
            policy.detach(),
            inputs.rollout_logits,
            kind="tv" if self.config.kind == "tv" else "kl",
            token_mask=tokens.mask,
            known=_engine_probabilities(tokens.cleaned()),
            temperature=self.config.temperature,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            backend=self.backend,
            checks="off",
        )


def _engine_probabilities(tokens: FlatTokens) -> KnownProbabilities | None:
    """What the serving engine reported, for the hybrid exact divergence; None without its top K."""
    if tokens.topk_ids is None or tokens.topk_log_probs is None or tokens.topk_ids.shape[1] == 0:
        return None
    return KnownProbabilities(
        ids=torch.cat([tokens.topk_ids, tokens.target[:, None]], dim=1),
        log_prob=torch.cat([tokens.topk_log_probs, tokens.rollout_log_probs[:, None]], dim=1),
        valid=sampled_slot_valid(tokens.topk_ids, tokens.target),
    )
