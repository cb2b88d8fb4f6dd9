"""DPPO in SkyRL: a policy loss for its registry. In your entry script, before Ray starts::

    from megatron_dppo import DPPOConfig
    from megatron_dppo.integrations.skyrl import register
    register("divergence_ppo", DPPOConfig(divergence="binary_tv"))

    ... trainer.algorithm.policy_loss_type=divergence_ppo generator.sampling_params.logprobs=1

The name must be one that SkyRL does not have: its workers keep a loss of their own over one of the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from megatron_dppo.errors import ConfigError, LossInputError
from megatron_dppo.integrations.framework import framework_module, mean_values, require_version
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.token_losses import check_reads, token_losses

RECORDED_VERSIONS = ("0.3.0",)

PolicyLoss = Callable[..., tuple[torch.Tensor, dict[str, float]]]


def register(
    name: str, config: DPPOConfig, *, backend: str = "auto", checks: Literal["now", "off"] = "now"
) -> PolicyLoss:
    """Add the loss to SkyRL's registry as ``policy_loss_type=name``, and return it.

    Args:
        name: what it is called in SkyRL's configuration.
        config: what is optimised; loss reduction, temperature, entropy and KL are options of SkyRL's own.
        backend, checks: as for ``DPPOLoss``.

    Raises:
        MissingDependencyError: SkyRL is not installed.
        ConfigError: its version is not one whose call was recorded, or ``config`` asks for what is not read here.
    """
    require_version("skyrl", str(framework_module("skyrl").__version__), RECORDED_VERSIONS)
    check_reads(config)

    def policy_loss(
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor | None,
        advantages: torch.Tensor,
        config: Any,
        loss_mask: torch.Tensor | None = None,
        rollout_logprobs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """[b, r] each. SkyRL has divided the advantages so that a sum over tokens is what its loss reduction asks for."""
        if rollout_logprobs is None:
            raise LossInputError(
                "skyrl: the batch has no rollout_logprobs, and old_log_probs, which the trainer recomputes, are no "
                "substitute: set generator.sampling_params.logprobs=1"
            )
        correction = framework_module("skyrl.backends.skyrl_train.utils.off_policy_correction_utils")
        if correction.off_policy_correction_enabled(config.off_policy_correction):
            raise ConfigError(
                "skyrl: off_policy_correction is for an anchor that is not the rollout policy; here it is: leave it out"
            )
        losses = token_losses(
            dppo,
            log_probs,
            rollout_log_probs=rollout_logprobs,
            advantages=advantages,
            loss_mask=loss_mask,
            backend=backend,
            checks=checks,
        )
        means = mean_values(losses.metrics)
        return losses.per_token.sum(), {"clip_ratio": means["dppo/mask_fraction"], **means}

    dppo = config
    framework_module("skyrl.backends.skyrl_train.utils.ppo_utils").PolicyLossRegistry.register(name, policy_loss)
    return policy_loss
