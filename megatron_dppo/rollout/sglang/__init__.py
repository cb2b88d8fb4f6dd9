"""Rollouts from SGLang servers."""

from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.engine import SGLangEngine

__all__ = ["SGLangConfig", "SGLangEngine"]
