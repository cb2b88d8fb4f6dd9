"""DPPO in Megatron-LM's train_rl.py, in place of its GRPO loss. In your copy of it, after its imports::

    from megatron.rl import rl_utils
    from megatron_dppo import DPPOConfig
    from megatron_dppo.integrations.megatron_rl import make_grpo_loss, make_selective_log_softmax
    calculate_grpo_loss = make_grpo_loss(DPPOConfig(divergence="binary_tv"))
    rl_utils.selective_log_softmax = make_selective_log_softmax(vocab_size=151936)

    torchrun ... train_rl.py --rl-inference-logprobs-is-correction ...

train_rl.py hands the engine's log-probs to its loss only with that option. The last line of the module is for bf16 models: of
bf16 logits its own log-softmax makes bf16 log-probs, in which the ratio is lost. It leaves out the vocabulary's padding, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from megatron_dppo.errors import ConfigError, LossInputError
from megatron_dppo.integrations.framework import framework_module, require_version
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.regularisers import reference_kl
from megatron_dppo.loss.token_losses import check_reads, token_losses
from megatron_dppo.ops.policy_stats import vocab_parallel_policy_stats

RECORDED_VERSIONS = ("0.20.0",)
# In a packed row a token that the engine did not draw (an end that the trainer appends) has the log-prob 0, i.e. certainty;
# one that it drew with certainty is not far from that for the trainer either.
_SURELY_NOT_CERTAIN = -0.1

GRPOLoss = Callable[..., tuple[torch.Tensor, ...]]


def make_grpo_loss(config: DPPOConfig, *, backend: str = "auto", checks: Literal["now", "off"] = "now") -> GRPOLoss:
    """A function to be called as ``calculate_grpo_loss`` is, with the same results.

    Args:
        config: what is optimised; normalisation and the KL to a reference policy are train_rl.py's own.
        backend, checks: as for ``DPPOLoss``.

    Raises:
        MissingDependencyError: Megatron is not installed.
        ConfigError: its version is not one whose call was recorded, or ``config`` asks for what is not read here.
    """
    version = str(framework_module("megatron.core.package_info").__version__)
    require_version("Megatron-LM's train_rl.py, megatron-core", version, RECORDED_VERSIONS)
    check_reads(config)

    def calculate_grpo_loss(
        current_logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        clamp_eps_lower: float,
        clamp_eps_upper: float,
        kl_beta: float,
        entropy_weight: float,
        inference_logprobs: torch.Tensor | None = None,
        is_truncation_coef: float | None = None,
        seq_starts: list[int] | None = None,
        seq_lengths: list[int] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """[b, s - 1] log-probs with [b] advantages, or a packed row [1, n - 1] with one advantage a sequence.

        Returns:
            Of every token: the loss, the KL term, r = pi / mu, the entropy term (0), and whether the trust region dropped
            it with A > 0 and with A < 0. train_rl.py applies its mask to all of them.
        """
        if inference_logprobs is None or (checks == "now" and not inference_logprobs.any()):
            raise LossInputError(
                "Megatron-LM: the engine's log-probs are not there, and old_logprobs, which the trainer recomputes, are no "
                "substitute: pass --rl-inference-logprobs-is-correction, with an engine that returns log-probs"
            )
        if entropy_weight != 0.0 or is_truncation_coef is not None:
            raise ConfigError(
                "Megatron-LM: --grpo-entropy-term-weight and --rl-importance-sampling-truncation-coef are not read by this "
                "loss: leave them out"
            )
        drawn = (inference_logprobs != 0.0) | (old_logprobs > _SURELY_NOT_CERTAIN)
        per_token_advantages = _of_every_token(advantages, current_logprobs, seq_starts, seq_lengths)
        losses = token_losses(
            config,
            current_logprobs,
            rollout_log_probs=inference_logprobs,
            advantages=per_token_advantages,
            loss_mask=drawn,
            backend=backend,
            checks=checks,
        )
        kl_term = reference_kl(current_logprobs, ref_logprobs, "k3")
        ratios = (current_logprobs.detach() - inference_logprobs).exp()
        dropped = (losses.weight == 0) & drawn
        return (
            losses.per_token + kl_beta * kl_term,
            kl_term,
            ratios,
            torch.zeros_like(ratios),
            dropped & (per_token_advantages > 0),
            dropped & (per_token_advantages < 0),
        )

    return calculate_grpo_loss


def _of_every_token(
    advantages: torch.Tensor,
    log_probs: torch.Tensor,
    seq_starts: list[int] | None,
    seq_lengths: list[int] | None,
) -> torch.Tensor:
    """[b, s - 1] from one advantage a sequence."""
    if seq_starts is None or seq_lengths is None:
        return advantages.to(log_probs.dtype).view(-1, 1).expand(log_probs.shape)
    spread = torch.zeros_like(log_probs, requires_grad=False)
    for i, (start, length) in enumerate(zip(seq_starts, seq_lengths, strict=False)):  # seq_starts may end with the end
        spread[0, start : start + length - 1] = advantages[i]  # a sequence has one log-prob less than tokens
    return spread


def make_selective_log_softmax(vocab_size: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function to be called as ``selective_log_softmax(logits, index)`` is: fp32 log-probs over the true vocabulary."""

    def selective_log_softmax(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[b, s, V] whole logits and [b, s] tokens -> [b, s]."""
        return vocab_parallel_policy_stats(logits, index, vocab_size=vocab_size).log_prob

    return selective_log_softmax
