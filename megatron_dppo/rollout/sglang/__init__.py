"""Rollouts from SGLang servers."""

from typing import TYPE_CHECKING, Any

from megatron_dppo.rollout.sglang.config import SGLangConfig

if TYPE_CHECKING:
    from megatron_dppo.rollout.sglang.engine import SGLangEngine

__all__ = ["SGLangConfig", "SGLangEngine"]


def __getattr__(name: str) -> Any:
    """Import the engine when it is asked for: its HTTP client is an extra, and every run reads the configuration."""
    if name != "SGLangEngine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_dppo.rollout.sglang.engine import SGLangEngine

    return SGLangEngine
