"""How one policy is spread over ranks: sizes of the parallel groups, setting them up, and who holds one copy."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from megatron_dppo.compat.extras import from_extra
from megatron_dppo.compat.megatron_on_cpu import enable_megatron_on_cpu
from megatron_dppo.distributed.parallel_config import ParallelConfig

with from_extra("train"):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

_replica_group: dist.ProcessGroup | None = None


def initialize_model_parallel(parallel: ParallelConfig, seed: int) -> None:
    """Set up Megatron's process groups and its random-number streams.

    Collective over the default group, which has to exist. ``seed`` is the same on every rank; tensor- and
    expert-parallel ranks get streams of their own from it, data-parallel ranks the same ones (the policy has no dropout).

    Raises:
        ConfigError: the layout does not divide the world.
        RuntimeError: torch.distributed is not initialised, or the model-parallel groups already are.
    """
    if not dist.is_initialized():
        raise RuntimeError("initialize_model_parallel needs torch.distributed.init_process_group first")
    if parallel_state.model_parallel_is_initialized():
        raise RuntimeError("model parallelism is already initialised: destroy_model_parallel() first")
    parallel.check_world_size(dist.get_world_size())
    enable_megatron_on_cpu()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        # The schedules and the embedding groups ask this global state; core reads 1 as "interleaved".
        virtual_pipeline_model_parallel_size=parallel.chunks_per_stage if parallel.chunks_per_stage > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        distributed_timeout_minutes=parallel.collective_timeout_s / 60,
        # Twins of the data-parallel groups for CPU tensors, in which nothing here travels: a mesh of sockets each.
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    global _replica_group
    _replica_group = _make_replica_groups(parallel)


def _make_replica_groups(parallel: ParallelConfig) -> dist.ProcessGroup:
    """The group of ranks with this data-parallel rank: core has groups for TP x PP and TP x CP, none for all three.

    Nobody has to be asked who is in it: core counts ranks in the order TP, CP, DP, PP.
    """
    neighbours = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    replicas = parallel_state.get_data_parallel_world_size()
    groups = [
        [
            (stage * replicas + replica) * neighbours + neighbour
            for stage in range(parallel.pipeline_model_parallel_size)
            for neighbour in range(neighbours)
        ]
        for replica in range(replicas)
    ]
    mine = groups[parallel_state.get_data_parallel_rank()]
    expected = {
        *dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()),
        *dist.get_process_group_ranks(parallel_state.get_tensor_and_context_parallel_group()),
    }
    if not expected <= set(mine):
        raise RuntimeError(f"megatron-core counts ranks in another order: {sorted(expected)} are not within {mine}")
    group, _ = dist.new_subgroups_by_enumeration(groups, timeout=timedelta(seconds=parallel.collective_timeout_s))
    assert group is not None
    return group


def replica_group() -> dist.ProcessGroup:
    """The ranks that hold one copy of the dense weights between them (TP x PP x CP), this rank included.

    They see the same prompts and sequences. Expert-parallel ranks of an MoE policy can lie in several replicas: those
    replicas hold each other's experts and must run their forward passes at the same time.
    """
    if _replica_group is None or not parallel_state.model_parallel_is_initialized():
        raise RuntimeError("replica_group() needs initialize_model_parallel first")
    return _replica_group
