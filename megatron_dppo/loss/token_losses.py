"""The loss of every token from log-probs that somebody else computed; adding them up is left to the caller.

For pipelines whose hook hands over the sampled tokens' log-probs instead of logits, and that normalise by rules of their
own. Per token the same as ``DPPOLoss``: value ``-w r A``, gradient ``-w r A grad(log pi)``. What needs more of the policy
than one log-prob, and what belongs to adding up, is refused by name: it would promise something that does not happen.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch

from megatron_dppo.errors import ConfigError, LossInputError
from megatron_dppo.loss.checks import CHECKS, InputChecks, check_sampled_values
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.fused_objective import objective_of
from megatron_dppo.loss.inputs import FlatTokens, masked
from megatron_dppo.loss.metrics import LOSS, MetricSums
from megatron_dppo.loss.regularisers import scored
from megatron_dppo.ops.backend import choose_backend
from megatron_dppo.ops.policy_stats import PolicyStats
from megatron_dppo.ops.torch_backend import compute_dtype

# What the pipeline decides by options of its own.
_OF_THE_PIPELINE = ("aggregation", "horizon", "temperature", "entropy_coef", "kl_coef", "kl_estimator")
_NO_VOCABULARY = 1  # only predictive directions ask for its size


@dataclass(frozen=True)
class TokenLosses:
    """Of one call; nothing waits for the device unless it is read.

    Attributes:
        per_token: [...] fp32 ``-w r A``, with the gradient of the log-probs given; 0 outside the mask.
        weight: [...] fp32 trust-region weight, 0 outside the mask, detached.
        divergence: [...] fp32 D(mu || pi), 0 outside the mask, detached.
        metrics: to be added up over micro-batches and ranks, then finalised; without entropy.
        checks: what is wrong with the inputs, to be looked at later; None with ``checks="off"``.
    """

    per_token: torch.Tensor
    weight: torch.Tensor
    divergence: torch.Tensor
    metrics: MetricSums
    checks: InputChecks | None


def check_reads(config: DPPOConfig) -> None:
    """Raise ConfigError for what cannot be had from the sampled tokens' log-probs alone."""
    if config.partition != "binary":
        raise ConfigError(
            f"divergence={config.divergence!r} needs more than the sampled tokens' log-probs: choose binary_tv or binary_kl, "
            "or call DPPOLoss with logits"
        )
    if config.direction == "predictive":
        raise ConfigError(
            "direction='predictive' needs the policy's collision sum: choose 'ratio', or call DPPOLoss with logits"
        )
    defaults = {field.name: field.default for field in fields(config)}
    for name in _OF_THE_PIPELINE:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(
                f"DPPOConfig.{name}={getattr(config, name)!r} is not read here: the pipeline that calls the loss has an "
                f"option of its own for it. Leave it at {defaults[name]!r}"
            )


def token_losses(
    config: DPPOConfig,
    log_probs: torch.Tensor,
    *,
    rollout_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor | None,
    backend: str = "auto",
    checks: Literal["now", "deferred", "off"] = "now",
) -> TokenLosses:
    """Decide about every token.

    Args:
        config: divergence, thresholds, trust region; what the pipeline decides must be at its default (``check_reads``).
        log_probs: [...] fp32 or fp64, of the sampled tokens under the policy, with gradient, at the sampling temperature.
        rollout_log_probs: [...] the same under the policy that **generated** the tokens, as its engine reported them.
        advantages: [...].
        loss_mask: [...] bool or 0/1; None: every token counts. Nothing outside is read.
        backend: auto | cuda | cpu | torch.
        checks: as for ``DPPOLoss``.

    Raises:
        ConfigError: the configuration asks for something that is not read here.
        LossInputError: a shape or dtype is wrong or (``checks="now"``) a value is impossible.
    """
    if checks not in CHECKS:
        raise ValueError(f"checks must be one of {', '.join(CHECKS)}, not {checks!r}")
    check_reads(config)
    _check_shapes(log_probs, rollout_log_probs=rollout_log_probs, advantages=advantages, loss_mask=loss_mask)
    chosen, dtype, shape = choose_backend(backend, log_probs), compute_dtype(log_probs), log_probs.shape
    mask = None if loss_mask is None else loss_mask.reshape(-1).bool()
    flat = masked(log_probs.reshape(-1), mask)
    tokens = FlatTokens(
        mask=mask,
        target=torch.zeros(flat.shape, dtype=torch.int64, device=flat.device),
        advantages=advantages.detach().reshape(-1).to(dtype).contiguous(),
        rollout_log_probs=rollout_log_probs.detach().reshape(-1).to(dtype).contiguous(),
        topk_ids=None,
        topk_log_probs=None,
        ref_log_probs=None,
    )
    found = None
    if checks != "off":
        found = check_sampled_values(log_probs.detach(), advantages, rollout_log_probs, loss_mask)
    if checks == "now" and found is not None:
        found.raise_errors()
    unknown = torch.zeros_like(tokens.advantages)
    stats = PolicyStats(flat.detach().to(dtype), entropy=unknown, collision=unknown, topk_log_prob=None)
    objective = objective_of(chosen)(config, tokens, stats, None, _NO_VOCABULARY)
    return TokenLosses(
        per_token=scored(objective.coefficient, flat, -1.0).view(shape),
        weight=objective.weight.view(shape),
        divergence=objective.divergence.view(shape),
        metrics=objective.metrics.without_means("entropy", LOSS),
        checks=found,
    )


def _check_shapes(log_probs: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, values in {"log_probs": log_probs, **others}.items():
        if values is not None and values.shape != log_probs.shape:
            raise LossInputError(
                f"{name} has shape {tuple(values.shape)}, the policy's log_probs {tuple(log_probs.shape)}: one value is "
                "needed for each"
            )
        if values is not None and name != "loss_mask" and values.dtype not in (torch.float32, torch.float64):
            raise LossInputError(
                f"{name} must be float32, not {values.dtype}: half precision has lost the ratio already"
            )
