"""Options of the embedded engine, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_dppo.errors import ConfigError
from megatron_dppo.rollout.embedded.rounding import ROUNDINGS

NOT_ROUNDED = "none"


@dataclass(frozen=True, kw_only=True)
class EmbeddedConfig:
    """What the embedded engine computes with: the training weights or, for experiments on mismatch, rounded ones.

    Attributes:
        weight_rounding: none | bf16 | fp8_e4m3 | int8: weights are rounded for generating, as a server would hold them, and
            trained unrounded. bf16 rounds every parameter, the others every matrix row by row
            (`rollout/embedded/rounding.py`); routers are left to `router_rounding`. The log-probs that are recorded are those
            of the rounded policy. Costs one more copy of this rank's weights while it generates.
        router_rounding: the same for the routers of an MoE policy alone: some tokens then go to other experts than in
            training.
    """

    weight_rounding: str = NOT_ROUNDED
    router_rounding: str = NOT_ROUNDED

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in (NOT_ROUNDED, *ROUNDINGS):
                raise ConfigError(
                    f"EmbeddedConfig.{field.name} must be one of {', '.join((NOT_ROUNDED, *ROUNDINGS))}, not {value!r}"
                )

    @property
    def rounds(self) -> bool:
        """Whether any weight is rounded."""
        return self != EmbeddedConfig()
