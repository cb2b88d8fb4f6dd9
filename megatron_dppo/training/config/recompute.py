"""Activation recompute: which activations the forward pass drops, for the backward pass to compute again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_dppo.errors import ConfigError

GRANULARITIES = ("none", "selective", "full")
METHODS = ("uniform", "block")
# What core can recompute of a layer of the policies that this package builds.
TRANSFORMER_ENGINE_MODULES = ("moe_act", "layernorm")  # by code of its own, in its layers
MODULES = ("core_attn", "mlp", "moe", *TRANSFORMER_ENGINE_MODULES)


@dataclass
class RecomputeConfig:
    """Activations that the forward pass drops and the backward pass computes again: memory for time, no number changes.

    Attributes:
        granularity: none | selective: parts of every layer (``modules``) | full: whole layers (``method``, ``num_layers``).
        method: full: uniform: the layers of a model chunk in runs of ``num_layers``, of each of which the input is kept |
            block: the first ``num_layers`` layers of every chunk, each by itself, and none of the others.
        num_layers: see method. Uniform with 1 keeps every layer's input: the least to compute again at once.
        modules: selective: core_attn (attention between query, key, value and its output; FlashAttention recomputes by
            itself), mlp (dense policies), moe (router, experts and the way there), moe_act and layernorm (the cheapest
            parts that hold much; both need Transformer Engine).
    """

    granularity: str = "none"
    method: str = "uniform"
    num_layers: int = 1
    modules: list[str] = field(default_factory=lambda: ["core_attn"])

    def check(self, layers_of_chunks: list[int], is_moe: bool) -> None:
        """Raise ConfigError for what core would refuse, or take and do nothing.

        Args:
            layers_of_chunks: how many layers each model chunk of each pipeline stage has.
            is_moe: whether the layers hold experts.
        """
        for name, value, choices in (
            ("granularity", self.granularity, GRANULARITIES),
            ("method", self.method, METHODS),
            *(("modules", module, MODULES) for module in self.modules),
        ):
            if value not in choices:
                raise ConfigError(f"model.recompute.{name} must be one of {', '.join(choices)}, not {value!r}")
        if self.granularity == "full" and not 1 <= self.num_layers <= max(layers_of_chunks):
            raise ConfigError(
                f"model.recompute.num_layers={self.num_layers} must be from 1 to {max(layers_of_chunks)}, the most layers"
                " that one model chunk has in this layout"
            )
        if self.granularity != "selective":
            return
        if not self.modules:
            raise ConfigError("model.recompute.modules is empty: name a module, or set granularity=none")
        absent = ("mlp",) if is_moe else ("moe", "moe_act")
        for module in self.modules:
            if module in absent:
                kind = "an MoE policy has no dense MLP" if is_moe else "a dense policy has no experts"
                raise ConfigError(f"model.recompute.modules: {module}: {kind}; choose another module")

    def transformer_fields(self) -> dict[str, Any]:
        """The fields of core's TransformerConfig that say so."""
        if self.granularity == "none":
            return {}
        if self.granularity == "selective":
            return {"recompute_granularity": "selective", "recompute_modules": list(self.modules)}
        return {
            "recompute_granularity": "full",
            "recompute_method": self.method,
            "recompute_num_layers": self.num_layers,
        }
