"""Other layouts of the same policy on as many GPUs, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_dppo.distributed.parallel_config import ParallelConfig
from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.plan.memory import Memo
from megatron_dppo.launch.plan.plan import Plan, changed, make_plan
from megatron_dppo.launch.plan.servers import parameters_of
from megatron_dppo.models.hf.config import check_policy_fits, is_moe
from megatron_dppo.training.config.schema import MODEL_DTYPES

_LARGEST_PIPELINE = 16


@dataclass(frozen=True)
class Found:
    """What came of a search.

    Attributes:
        plans: that fit, the fastest first.
        refused: layouts that the trainer's own checks refuse.
        too_large: layouts that do not fit the GPUs.
    """

    plans: list[Plan]
    refused: int
    too_large: int


def search(plan: Plan, memo: Memo) -> Found:
    """All layouts of ``plan``'s policy on its GPUs, everything else as in its recipe."""
    plans: list[Plan] = []
    refused = too_large = 0
    for parallel in _layouts(plan):
        try:
            check_policy_fits(plan.hf_config, parallel, plan.setting.world_size)
            if least_bytes(plan, parallel) + plan.assume.memory_reserve > plan.gpu.memory:
                too_large += 1
                continue
            other = make_plan(
                changed(plan.config, "parallel", parallel),
                plan.hf_config,
                world_size=plan.setting.world_size,
                gpus_per_node=plan.setting.gpus_per_node,
                gpu=plan.gpu,
                assume=plan.assume,
                memo=memo,
            )
        except ConfigError:
            refused += 1
            continue
        if other.problems:
            too_large += 1
        else:
            plans.append(other)
    return Found(sorted(plans, key=lambda other: other.step.total), refused, too_large)


def _layouts(plan: Plan) -> Iterator[ParallelConfig]:
    """Of powers of two, experts whole. TP stays on a node; CP is none or the recipe's."""
    world_size, own = plan.setting.world_size, plan.config.parallel
    sizes = [2**n for n in range(world_size.bit_length()) if 2**n <= world_size]
    experts = sizes if is_moe(plan.hf_config) else [1]
    for tensor in (size for size in sizes if size <= plan.setting.gpus_per_node):
        for context in sorted({1, own.context_parallel_size}):
            for pipeline in (size for size in sizes if size <= _LARGEST_PIPELINE):
                for expert in experts:
                    first, last = _uneven_ends(plan.hf_config.num_hidden_layers, pipeline)
                    yield replace(
                        own,
                        tensor_model_parallel_size=tensor,
                        context_parallel_size=context,
                        pipeline_model_parallel_size=pipeline,
                        expert_model_parallel_size=expert,
                        expert_tensor_parallel_size=None,
                        sequence_parallel=None,
                        virtual_pipeline_model_parallel_size=None,
                        num_layers_in_first_pipeline_stage=first,
                        num_layers_in_last_pipeline_stage=last,
                    )


def _uneven_ends(layers: int, stages: int) -> tuple[int | None, int | None]:
    """First and last stage, which also have the embedding and the output layer, have fewer layers if all cannot be equal."""
    if stages <= 2 or layers % stages == 0:
        return None, None
    left = layers - (stages - 2) * -(-layers // stages)
    return (left - left // 2, left // 2) if left >= 2 else (None, None)


def least_bytes(plan: Plan, parallel: ParallelConfig) -> float:
    """Of weights, gradients and optimizer state on a rank, if layers were all there is: no rank has so little everywhere."""
    itemsize = MODEL_DTYPES[plan.config.model.dtype].itemsize
    memory = plan.config.train.optimizer_memory
    state = memory.bytes_per_parameter(plan.config.model.dtype) * (1 - memory.offload_fraction)
    world_size = plan.setting.world_size
    dense, experts = parameters_of(plan.hf_config)
    total = 0.0
    for count, split in (
        (dense, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size),
        (
            experts,
            parallel.expert_model_parallel_size * parallel.expert_tensor_size * parallel.pipeline_model_parallel_size,
        ),
    ):
        copies = max(1, world_size // split) if parallel.use_distributed_optimizer else 1
        total += count / split * (itemsize + 4 + state / copies)
    return total
