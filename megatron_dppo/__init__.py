"""Divergence PPO (DPPO, arXiv 2602.04879) for Megatron-LM. The public names; importing them needs torch alone."""

from megatron_dppo.loss.advantages import group_advantages
from megatron_dppo.loss.checks import InputChecks
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.dppo_loss import DPPOLoss, LinearHead, LossOutput
from megatron_dppo.loss.inputs import LossInputs, Sequences, TopK
from megatron_dppo.loss.metrics import MetricSums
from megatron_dppo.loss.token_losses import TokenLosses, token_losses
from megatron_dppo.ops.fused_linear import fused_linear_policy_stats
from megatron_dppo.ops.policy_stats import PolicyStats, vocab_parallel_policy_stats

__all__ = [
    "DPPOConfig",
    "DPPOLoss",
    "InputChecks",
    "LinearHead",
    "LossInputs",
    "LossOutput",
    "MetricSums",
    "PolicyStats",
    "Sequences",
    "TokenLosses",
    "TopK",
    "fused_linear_policy_stats",
    "group_advantages",
    "token_losses",
    "vocab_parallel_policy_stats",
]
