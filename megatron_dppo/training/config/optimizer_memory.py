"""How the optimizer's state is kept: 12 bytes for every parameter that a rank updates, unless it is rounded or moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_dppo.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Adam keeps beta2 of the second moment. bf16 has 8 significant bits: what takes less than half a unit of them away, 2^-8
# where the unit is largest, is rounded away itself, and the moment never falls again.
_LARGEST_BETA2_IN_BF16 = 1 - 2.0**-8


@dataclass
class OptimizerMemoryConfig:
    """Less memory for Adam's state than 12 bytes a parameter: fp32 main weight, first and second moment.

    Attributes:
        first_moment: fp32 | bf16 (2 bytes less; Megatron's precision-aware optimizer, in Transformer Engine's kernel).
        second_moment: fp32 | bf16, likewise. bf16 with adam_beta2 up to 0.996 only: closer to 1, what a step adds or takes
            away is rounded away, and the moment stays where it was.
        offload_fraction: of the parameters that a rank updates, whose state is in host memory and which the CPU updates.
            Their gradients and new weights travel over PCIe in every optimizer step. 0: none.
    """

    first_moment: str = "fp32"
    second_moment: str = "fp32"
    offload_fraction: float = 0.0

    @property
    def is_default(self) -> bool:
        """Whether the state is kept as always."""
        return self == OptimizerMemoryConfig()

    def bytes_per_parameter(self, dtype: str) -> int:
        """Of the state of a parameter that a rank updates, wherever it is kept: moments, and the fp32 main weight of bf16."""
        main = 0 if dtype == "fp32" else 4
        return main + sum(_DTYPES[moment].itemsize for moment in (self.first_moment, self.second_moment))

    def check(
        self, *, dtype: str, distributed: bool, device: str, beta2: float, transformer_engine: str | None
    ) -> None:
        """Raise ConfigError for what core or the arithmetic cannot do.

        Args:
            dtype: of the policy: bf16 | fp32.
            distributed: whether there is the distributed optimizer.
            device: cuda | cpu.
            beta2: the largest that is used.
            transformer_engine: why it cannot be used; None if it can.
        """
        for name in ("first_moment", "second_moment"):
            if getattr(self, name) not in _DTYPES:
                raise ConfigError(
                    f"train.optimizer_memory.{name} must be one of {', '.join(_DTYPES)}, not {getattr(self, name)!r}"
                )
        if not 0 <= self.offload_fraction <= 1:
            raise ConfigError(f"train.optimizer_memory.offload_fraction={self.offload_fraction} must be from 0 to 1")
        if self.is_default:
            return
        rounded = [name for name in ("first_moment", "second_moment") if getattr(self, name) != "fp32"]
        what = f"train.optimizer_memory.{rounded[0] if rounded else 'offload_fraction'}"
        if not distributed or dtype != "bf16" or device != "cuda":
            raise ConfigError(
                f"{what} needs GPUs, model.dtype=bf16 and parallel.use_distributed_optimizer=true: Megatron's precision-aware"
                " and hybrid optimizers are built on these"
            )
        if transformer_engine is not None:
            raise ConfigError(
                f"{what} needs Transformer Engine, whose Adam these optimizers call: {transformer_engine}"
            )
        if not rounded:
            return
        if self.offload_fraction:
            raise ConfigError(f"{what}=bf16 with offload_fraction: the CPU's Adam has fp32 moments. Choose one of them")
        if self.second_moment == "bf16" and beta2 > _LARGEST_BETA2_IN_BF16:
            raise ConfigError(
                f"train.optimizer_memory.second_moment=bf16 with adam_beta2={beta2}: a step changes the second moment by less"
                f" than bf16 can show; keep it in fp32, or set adam_beta2 to {_LARGEST_BETA2_IN_BF16:.3f} at most"
            )

    def optimizer_fields(self) -> dict[str, Any]:
        """The fields of core's OptimizerConfig that say so."""
        if self.is_default:
            return {}
        fields: dict[str, Any] = {
            # Of weights in 16 bits: their fp32 main copies are then the optimizer's own, on whatever device it is.
            "use_precision_aware_optimizer": True,
            "exp_avg_dtype": _DTYPES[self.first_moment],
            "exp_avg_sq_dtype": _DTYPES[self.second_moment],
            # Whole fp32 main weights, not the 16 bits by which they differ from the weights: what a checkpoint holds.
            "store_param_remainders": False,
        }
        if self.offload_fraction:
            fields.update(
                optimizer_cpu_offload=True,
                optimizer_offload_fraction=self.offload_fraction,
                overlap_cpu_optimizer_d2h_h2d=True,
            )
        return fields
