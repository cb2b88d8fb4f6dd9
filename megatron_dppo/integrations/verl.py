"""DPPO in verl: a policy loss for its registry, and its log-probs from one read of the sharded logits.

In a module of your own, named in ``VERL_USE_EXTERNAL_MODULES`` so that every worker imports it::

    from megatron_dppo import DPPOConfig
    from megatron_dppo.integrations.verl import register
    register("dppo", DPPOConfig(divergence="binary_tv"))

    python -m verl.trainer.main_ppo actor_rollout_ref.actor.policy_loss.loss_mode=dppo \\
        actor_rollout_ref.rollout.calculate_log_probs=True algorithm.rollout_correction.bypass_mode=True \\
        '+actor_rollout_ref.actor.policy_loss.rollout_correction=${algorithm.rollout_correction}'

verl hands a policy loss one anchor, ``old_log_prob``: by default a recomputation, with ``bypass_mode`` what the engine that
generated the sample reported. The numbers do not say which; the last line shows the loss the option that decides it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from megatron_dppo.errors import ConfigError, LossInputError
from megatron_dppo.integrations.framework import framework_module, mean_values, require_version
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.token_losses import TokenLosses, check_reads, token_losses
from megatron_dppo.ops.policy_stats import vocab_parallel_policy_stats

RECORDED_VERSIONS = ("0.10.0.dev",)

PolicyLoss = Callable[..., tuple[torch.Tensor, dict[str, Any]]]


def register(
    name: str,
    config: DPPOConfig,
    *,
    backend: str = "auto",
    checks: Literal["now", "off"] = "now",
    collect: Callable[[TokenLosses], None] | None = None,
) -> PolicyLoss:
    """Add the loss to verl's registry as ``policy_loss.loss_mode=name``, and return it.

    Args:
        name: what it is called in verl's configuration.
        config: what is optimised; aggregation, temperature, entropy and KL are options of verl's own.
        backend, checks: as for ``DPPOLoss``.
        collect: called with the whole of every micro-batch, whose metrics add up exactly.

    Raises:
        MissingDependencyError: verl is not installed.
        ConfigError: its version is not one whose call was recorded, or ``config`` asks for what is not read here.
    """
    require_version("verl", str(framework_module("verl").__version__), RECORDED_VERSIONS)
    check_reads(config)
    core_algos = framework_module("verl.trainer.ppo.core_algos")

    def policy_loss(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """[b, r] each, of responses padded on the right; verl's own ``agg_loss`` normalises."""
        _require_rollout_anchor(config, rollout_is_weights)
        losses = token_losses(
            dppo,
            log_prob,
            rollout_log_probs=old_log_prob,
            advantages=advantages,
            loss_mask=response_mask,
            backend=backend,
            checks=checks,
        )
        if collect is not None:
            collect(losses)
        loss = core_algos.agg_loss(losses.per_token, response_mask, loss_agg_mode, **config.global_batch_info)
        return loss, {f"actor/{metric}": value for metric, value in mean_values(losses.metrics).items()}

    dppo = config
    return core_algos.register_policy_loss(name)(policy_loss)  # type: ignore[no-any-return]


def _require_rollout_anchor(actor: Any, rollout_is_weights: torch.Tensor | None) -> None:
    correction = actor.policy_loss.get("rollout_correction") or {}
    if not correction.get("bypass_mode", False):
        raise ConfigError(
            "verl: old_log_prob is a recomputation unless the engine's log-probs are asked for. Set "
            "actor_rollout_ref.rollout.calculate_log_probs=True, algorithm.rollout_correction.bypass_mode=True and "
            "'+actor_rollout_ref.actor.policy_loss.rollout_correction=${algorithm.rollout_correction}'"
        )
    if rollout_is_weights is not None:
        raise LossInputError(
            "verl: rollout_is_weights correct for an anchor that is not the rollout policy; here it is, and they would count "
            "twice. Set algorithm.rollout_correction.rollout_is=null"
        )


class OneReadHead:
    """Log-prob, entropy and sum of squares from one read of the logits; to be mixed into verl's Megatron engine::

        @EngineRegistry.register(model_type="language_model", backend="megatron", vendor="nvidia")
        class Engine(OneReadHead, MegatronEngineWithLMHead): ...

    verl's own clones the logits for the entropy, rounds the tempered logits to their dtype and counts padded columns.
    """

    def _lm_head_logits_processor(
        self,
        logits: torch.Tensor,
        label: torch.Tensor,
        temperature: torch.Tensor,
        *,
        calculate_sum_pi_squared: bool,
        calculate_entropy: bool,
        distillation_use_topk: bool,
        distillation_only: bool,
        **rest: Any,
    ) -> dict[str, torch.Tensor]:
        """[1, n, V/TP] logits, [1, n] labels that are rolled already, [1, n] temperatures (0 where padded) -> [1, n] each."""
        engine: Any = self
        if distillation_use_topk or distillation_only:
            raise ConfigError("verl: OneReadHead does not distil; leave it out of the engine for that")
        highest = temperature.max()
        low, high = torch.stack([torch.where(temperature > 0, temperature, highest).min(), highest]).tolist()
        if not 0 < low == high:
            raise LossInputError(
                f"verl: one sampling temperature is needed for the whole batch, not {low:g} to {high:g}"
            )
        stats = vocab_parallel_policy_stats(
            logits,
            label,
            temperature=high,
            vocab_size=engine.model_config.hf_config.vocab_size,
            tp_group=framework_module("megatron.core.parallel_state").get_tensor_model_parallel_group(),
            inplace_backward=True,
        )
        found = {"log_probs": stats.log_prob}
        if calculate_entropy:
            found["entropy"] = stats.entropy
        if calculate_sum_pi_squared:
            found["sum_pi_squared"] = stats.collision
        return found
