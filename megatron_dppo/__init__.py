"""Divergence PPO (DPPO, arXiv 2602.04879) for Megatron-LM. The public names; importing them needs torch alone."""

from megatron_dppo.loss.advantages import group_advantages
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.dppo_loss import DPPOLoss
from megatron_dppo.ops.policy_stats import PolicyStats, vocab_parallel_policy_stats

__all__ = ["DPPOConfig", "DPPOLoss", "PolicyStats", "group_advantages", "vocab_parallel_policy_stats"]
