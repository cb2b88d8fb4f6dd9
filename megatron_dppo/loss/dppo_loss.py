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

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_dppo.errors import LossInputError
from megatron_dppo.loss.aggregation import aggregation_of
from megatron_dppo.loss.checks import CHECKS, InputChecks, check_values
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.divergences import sampled_slot_valid
from megatron_dppo.loss.fused_objective import objective_of
from megatron_dppo.loss.inputs import FlatTokens, LossInputs, check_fields, flatten
from megatron_dppo.loss.metrics import MetricSums
from megatron_dppo.loss.regularisers import differentiable_zero, reference_kl
from megatron_dppo.ops.backend import choose_backend
from megatron_dppo.ops.exact_divergence import KnownProbabilities, vocab_parallel_divergence
from megatron_dppo.ops.fused_linear import CHUNK_BYTES, fused_linear_policy_stats
from megatron_dppo.ops.policy_stats import PolicyStats, vocab_parallel_policy_stats
from megatron_dppo.ops.torch_backend import compute_dtype


@dataclass(frozen=True)
class LinearHead:
    """In place of logits: what the output layer would make them of. They then never exist as a whole.

    Attributes:
        hidden: [..., h]; with ``sequence_parallel`` this rank's [s/TP, ..., h] of tokens [s, ...].
        weight: [V/TP, h] this rank's rows of the output layer, in the dtype of ``hidden``.
        sequence_parallel: ``hidden`` is sharded along its first dimension over the tensor-parallel group.
        reduce_hidden_grad: sum the gradient of ``hidden`` over that group. False: the caller does.
        accumulate_into_main_grad: add the weight's gradient to its ``main_grad`` (see ``ops/fused_linear.py``).
        fp32_logits: do not round the logits of 16-bit hidden states to 16 bits.
        chunk_bytes: largest tile of logits.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    _: KW_ONLY
    sequence_parallel: bool = False
    reduce_hidden_grad: bool = True
    accumulate_into_main_grad: bool = False
    fp32_logits: bool = False
    chunk_bytes: int = CHUNK_BYTES


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


class DPPOLoss:
    """The loss of ``config``: ``loss(logits, inputs)``, or ``loss(LinearHead(hidden, weight), inputs)``.

    Args:
        config: what is optimised.
        vocab_size: true size of the whole vocabulary. Megatron pads it; padded columns never count.
        tp_group: tensor-parallel group that the vocabulary is sharded over; None: logits are whole.
        backend: auto | cuda | cpu | torch.
        inplace_backward: overwrite the logits with their gradient, which saves their size in memory. Nothing else may need
            them.
        checks: what happens to impossible values (an id outside the vocabulary, a log-prob that is NaN or above 0, ...).
            now: LossInputError before the call returns, for which it waits for the device. That is the default, because
            otherwise somebody has to look. deferred: they are found, and raised by ``LossOutput.checks.raise_errors()``.
            off: not looked for.
    """

    def __init__(
        self,
        config: DPPOConfig,
        *,
        vocab_size: int,
        tp_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        inplace_backward: bool = False,
        checks: Literal["now", "deferred", "off"] = "now",
    ) -> None:
        if checks not in CHECKS:
            raise ValueError(f"checks must be one of {', '.join(CHECKS)}, not {checks!r}")
        self.config = config
        self.vocab_size = vocab_size
        self.tp_group = tp_group
        self.backend = backend
        self.inplace_backward = inplace_backward
        self.checks = checks

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
            checks = check_values(inputs, tokens, self.vocab_size, aggregation.local_lengths)
        stats = self._policy_stats(policy, tokens)
        exact_divergence = self._exact_divergence(policy, inputs, tokens)

        decide = objective_of(backend)
        objective = decide(self.config, tokens, stats.detach(), exact_divergence, self.vocab_size)
        # Value -w r A, gradient -w r A grad(log pi): the coefficient is a constant to autograd.
        per_token = -objective.coefficient * (1.0 + differentiable_zero(stats.log_prob))
        kl = None
        if tokens.ref_log_probs is not None:
            kl = reference_kl(stats.log_prob, tokens.ref_log_probs, self.config.kl_estimator)
        loss = aggregation.sum(self._with_penalties(per_token, stats.entropy, kl))
        reported = {"loss": (loss, aggregation.num_tokens)}
        if kl is not None:
            reported["reference/kl"] = (kl.double().sum(), tokens.count())

        shape = inputs.target.shape
        output = LossOutput(
            loss=loss,
            num_tokens=aggregation.num_tokens,
            metrics=objective.metrics.with_means(reported).with_updates(objective.coefficient, tokens.count()),
            weight=objective.weight.view(shape),
            divergence=objective.divergence.view(shape),
            log_prob=tokens.masked(stats.log_prob.detach()).view(shape),
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

    def _policy_stats(self, policy: torch.Tensor | LinearHead, tokens: FlatTokens) -> PolicyStats:
        """[N] statistics of the policy at the tokens, with gradient."""
        shape = self._tokens_shape(policy)
        topk_ids = tokens.topk_ids if self.config.needs_topk else None

        def shaped(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.view(*shape, *values.shape[1:])

        target = tokens.target.view(shape)
        common: dict[str, Any] = {
            "topk_ids": shaped(topk_ids),
            "temperature": self.config.temperature,
            "vocab_size": self.vocab_size,
            "tp_group": self.tp_group,
            "token_mask": shaped(tokens.mask),
            "backend": self.backend,
            "checks": "off",  # check_values has looked
        }
        if isinstance(policy, LinearHead):
            stats = fused_linear_policy_stats(
                policy.hidden,
                policy.weight,
                target,
                sequence_parallel=policy.sequence_parallel,
                reduce_hidden_grad=policy.reduce_hidden_grad,
                accumulate_into_main_grad=policy.accumulate_into_main_grad,
                fp32_logits=policy.fp32_logits,
                chunk_bytes=policy.chunk_bytes,
                **common,
            )
        else:
            stats = vocab_parallel_policy_stats(policy, target, inplace_backward=self.inplace_backward, **common)
        return stats.flatten()

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
            known=_engine_probabilities(tokens),
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
