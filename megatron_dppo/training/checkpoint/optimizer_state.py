"""What Megatron's optimizers keep on this rank, by parameter: the same view of the plain and the distributed optimizer.

Core's own state dicts are not used for checkpoints. Their structure follows the layout (one optimizer for dense and one
for expert parameters, but only with expert parallelism; other keys for the distributed optimizer), and what core's
``DistributedOptimizer.load_state_dict`` restores is not what was saved: with torch's Adam it gives all parameters the
*same* step tensor, which Adam then advances once per parameter, so that the bias correction of the next step is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerShard:
    """What is updated on this rank of one parameter.

    Attributes:
        parameter: the model's.
        main: the fp32 tensor that Adam updates, shaped as the parameter or a flat part of it. It shares memory with the
            parameter if that is fp32 itself, or if the optimizer keeps main weights of its own and has none yet. It is in
            host memory if its state is offloaded.
        start: element of the flattened parameter at which ``main`` begins.
        state: Adam's state of ``main``; empty before the first step.
    """

    parameter: torch.nn.Parameter
    main: torch.Tensor
    start: int
    state: dict[str, Any]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the weights do not say: each tensor has as many elements as ``main``."""
        kept = {key: self.state[key] for key in _MOMENTS if key in self.state}
        if self.parameter.dtype is not self.main.dtype:
            kept["fp32_param"] = self.main.detach()
        return kept


def optimizer_shards(optimizer: MegatronOptimizer) -> Iterator[OptimizerShard]:
    """Every parameter that this rank updates, or the part of it that it updates."""
    for part in _parts(optimizer):
        for parameter, updated in _parameters_with_updated(part):
            start = part._get_model_param_range_map(parameter)["param"].start if _is_distributed(part) else 0
            main, state = _main_and_state(part.optimizer, updated)
            yield OptimizerShard(parameter, main, start, state)


def allocate_optimizer_state(optimizer: MegatronOptimizer, steps: int) -> None:
    """Bring an optimizer to where it is after ``steps`` steps, but for the moments' values, which are zero if new."""
    for part in _parts(optimizer):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            for adam in part.optimizer.sub_optimizers:
                _allocate_moments(adam)
                _set_step(adam, steps)
            part.optimizer._sync_sub_optimizers_state_to_hdo()  # its own view of theirs
            continue
        part.init_state_fn(part.optimizer, part.config)
        _set_step(part.optimizer, steps)


def _allocate_moments(adam: torch.optim.Optimizer) -> None:
    for main in (main for group in adam.param_groups for main in group["params"]):
        for moment in _MOMENTS:
            adam.state[main].setdefault(moment, torch.zeros_like(main))


def _set_step(adam: torch.optim.Optimizer, steps: int) -> None:
    for group in adam.param_groups:
        if not isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)):
            group["step"] = steps  # the fused Adams of Transformer Engine and apex
            continue
        for main in group["params"]:
            adam.state[main]["step"] = torch.tensor(float(steps))  # a tensor for each: Adam counts in place


def optimizer_steps(optimizer: MegatronOptimizer) -> set[int]:
    """The numbers of steps that this rank's parameters have taken: one number if all is well, none before the first."""
    counts = set()
    for part in _parts(optimizer):
        for adam in _adams(part.optimizer):
            for group in adam.param_groups:
                states = [adam.state[main] for main in group["params"] if main in adam.state]
                counts |= {int(state["step"]) for state in states if "step" in state}
                if states and "step" in group:
                    counts.add(int(group["step"]))
    return counts


def _adams(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Those that do the work: one, or of offloaded state one on the device and one for each parameter on the host."""
    return optimizer.sub_optimizers if isinstance(optimizer, HybridDeviceOptimizer) else [optimizer]


def _main_and_state(optimizer: torch.optim.Optimizer, updated: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """What Adam updates for the tensor ``updated`` that core gave it, and its state of it (empty before the first step)."""
    if isinstance(optimizer, HybridDeviceOptimizer):
        main: torch.Tensor = optimizer.param_to_inner_param[updated]
        return main, next((adam.state[main] for adam in optimizer.sub_optimizers if main in adam.state), {})
    state = optimizer.state.get(updated, {})
    # A precision-aware Adam is given 16-bit shards and makes their main weights itself, in its first step.
    return state.get("master_param", updated), state


def _parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers that a ChainedOptimizer consists of; those without parameters on this rank are left out."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(part, "is_stub_optimizer", False):
            yield part


def _is_distributed(part: Any) -> bool:
    return isinstance(part, DistributedOptimizer)


def _parameters_with_updated(part: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    if _is_distributed(part):
        model = [*part.model_float16_groups, *part.model_fp32_groups]
        own_main = part.config.use_precision_aware_optimizer
        of_16_bits = part.shard_float16_groups if own_main else part.shard_fp32_from_float16_groups
        updated = [*of_16_bits, *part.shard_fp32_groups]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        model = [*part.float16_groups, *part.fp32_from_fp32_groups]
        updated = [*part.fp32_from_float16_groups, *part.fp32_from_fp32_groups]
    elif isinstance(part, FP32Optimizer):
        model = updated = [group["params"] for group in part.param_groups]
    else:
        raise TypeError(f"a checkpoint cannot hold the state of a {type(part).__name__}")
    for model_group, updated_group in zip(model, updated, strict=True):
        yield from zip(model_group, updated_group, strict=True)
