"""Divergence PPO (DPPO, arXiv 2602.04879) for Megatron-LM. The public names; importing them needs torch alone.

A name's module, and torch with it, is imported when the name is first used: processes that only grade responses, or start a
server, are there in half the time and take 200 MB less.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dppo.loss.advantages import group_advantages
    from megatron_dppo.loss.checks import InputChecks
    from megatron_dppo.loss.config import DPPOConfig
    from megatron_dppo.loss.dppo_loss import DPPOLoss, LossOutput
    from megatron_dppo.loss.inputs import LossInputs, Sequences, TopK
    from megatron_dppo.loss.linear_head import LinearHead
    from megatron_dppo.loss.metrics import MetricSums
    from megatron_dppo.loss.token_losses import TokenLosses, token_losses
    from megatron_dppo.ops.fused_linear import fused_linear_policy_stats
    from megatron_dppo.ops.policy_stats import PolicyStats, vocab_parallel_policy_stats

_NAMES_OF = {
    "loss.advantages": ("group_advantages",),
    "loss.checks": ("InputChecks",),
    "loss.config": ("DPPOConfig",),
    "loss.dppo_loss": ("DPPOLoss", "LossOutput"),
    "loss.inputs": ("LossInputs", "Sequences", "TopK"),
    "loss.linear_head": ("LinearHead",),
    "loss.metrics": ("MetricSums",),
    "loss.token_losses": ("TokenLosses", "token_losses"),
    "ops.fused_linear": ("fused_linear_policy_stats",),
    "ops.policy_stats": ("PolicyStats", "vocab_parallel_policy_stats"),
}
_HOME = {name: f"megatron_dppo.{module}" for module, names in _NAMES_OF.items() for name in names}

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
