"""DPPO in NeMo-RL, as a loss function class. In your copy of ``examples/run_grpo.py``, between ``setup(...)`` and training::

    from megatron_dppo import DPPOConfig
    from megatron_dppo.integrations.nemo_rl import DPPOLossFn
    loss_fn = DPPOLossFn(DPPOConfig(divergence="binary_tv"))

NeMo-RL hands it ``generation_logprobs`` with every batch. Its own recomputation, ``prev_logprobs``, is not read;
``loss_fn.force_on_policy_ratio=true`` in its configuration spares it where there is one update for each batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from megatron_dppo.errors import ConfigError, LossInputError
from megatron_dppo.integrations.framework import framework_module, require_version
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.token_losses import check_reads, token_losses

RECORDED_VERSIONS = ("0.6.0",)
_LOSS_TYPES = {"token_mean": "TOKEN_LEVEL", "seq_mean_token_mean": "SEQUENCE_LEVEL"}


class DPPOLossFn:
    """NeMo-RL's ``LossFunction`` protocol, on next-token log-probs.

    Args:
        config: what is optimised. ``aggregation`` chooses NeMo-RL's loss type: token_mean or seq_mean_token_mean; the
            temperature is an option of NeMo-RL's own.
        backend, checks: as for ``DPPOLoss``.

    Raises:
        MissingDependencyError: NeMo-RL is not installed.
        ConfigError: its version is not one whose call was recorded, or ``config`` asks for what is not read here.
    """

    def __init__(self, config: DPPOConfig, *, backend: str = "auto", checks: Literal["now", "off"] = "now") -> None:
        require_version("nemo_rl", str(framework_module("nemo_rl").__version__), RECORDED_VERSIONS)
        if config.aggregation not in _LOSS_TYPES:
            raise ConfigError(f"nemo_rl has the aggregations {', '.join(_LOSS_TYPES)}, not {config.aggregation!r}")
        check_reads(replace(config, aggregation="token_mean"))
        interfaces = framework_module("nemo_rl.algorithms.loss.interfaces")
        normalizer = interfaces.MetricNormalizer
        self.config, self.backend, self.checks = config, backend, checks
        self.input_type = interfaces.LossInputType.LOGPROB
        self.loss_type = interfaces.LossType[_LOSS_TYPES[config.aggregation]]
        by_token = config.aggregation == "token_mean"
        self.metric_normalizations = {
            "loss": normalizer.TOKENS if by_token else normalizer.SEQUENCES,
            **dict.fromkeys(_TOKEN_METRICS, normalizer.TOKENS),
            "num_valid_samples": normalizer.NONE,
        }

    def __call__(
        self,
        next_token_logprobs: torch.Tensor,
        data: Mapping[str, Any],
        global_valid_seqs: torch.Tensor,
        global_valid_toks: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """[b, s - 1] log-probs of tokens 1 to s - 1; ``data``'s fields are [b, s], ``sample_mask`` [b].

        Returns:
            This micro-batch's share of the global mean, and of every metric's; NeMo-RL adds them up.
        """
        if data.get("generation_logprobs") is None:
            raise LossInputError(
                "nemo_rl: the batch has no generation_logprobs, and prev_logprobs, which the trainer recomputes, are no "
                "substitute: a rollout of your own must return the log-probs that the engine reported"
            )
        token_mask, sample_mask = data["token_mask"][:, 1:], data["sample_mask"]
        mask = token_mask * sample_mask[:, None]
        losses = token_losses(
            replace(self.config, aggregation="token_mean"),
            next_token_logprobs,
            rollout_log_probs=data["generation_logprobs"][:, 1:],
            advantages=data["advantages"][:, 1:],
            loss_mask=mask,
            backend=self.backend,
            checks=self.checks,
        )
        masked_mean = framework_module("nemo_rl.algorithms.utils").masked_mean
        if self.config.aggregation == "token_mean":
            loss = masked_mean(losses.per_token, mask, global_normalization_factor=global_valid_toks)
        else:
            per_sequence = masked_mean(losses.per_token, token_mask, dim=-1)
            loss = masked_mean(per_sequence, sample_mask, global_normalization_factor=global_valid_seqs)
        log_ratio = (next_token_logprobs.detach() - data["generation_logprobs"][:, 1:]).masked_fill(mask == 0, 0.0)
        values = (losses.weight == 0, losses.divergence, log_ratio.abs().exp(), log_ratio.expm1() - log_ratio)
        shares = [masked_mean(v, mask, global_normalization_factor=global_valid_toks) for v in values]
        numbers = torch.stack([loss.detach(), *shares, sample_mask.sum()]).tolist()  # waits for the device, once
        return loss, dict(zip(("loss", *_TOKEN_METRICS, "num_valid_samples"), numbers, strict=True))


# The last two under the names that NeMo-RL's trainer prints: mean exp |log r| and KL (k3) of the policy at this update.
_TOKEN_METRICS = ("dppo/mask_fraction", "dppo/divergence_mean", "token_mult_prob_error", "gen_kl_error")
