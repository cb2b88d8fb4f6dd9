"""The layout as configured: defaults, impossible sizes, OmegaConf."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel, replica_group
from megatron_dppo.errors import ConfigError


def test_sequence_parallelism_follows_tensor_parallelism() -> None:
    assert not ParallelConfig().uses_sequence_parallel
    assert ParallelConfig(tensor_model_parallel_size=2).uses_sequence_parallel
    assert not ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=False).uses_sequence_parallel


def test_experts_are_kept_whole_with_expert_parallelism_and_split_without() -> None:
    assert ParallelConfig(tensor_model_parallel_size=2).expert_tensor_size == 2
    assert ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2).expert_tensor_size == 1
    assert ParallelConfig(tensor_model_parallel_size=4, expert_tensor_parallel_size=2).expert_tensor_size == 2


@pytest.mark.parametrize(
    "field",
    [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "virtual_pipeline_model_parallel_size",
    ],
)
def test_sizes_below_one_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1, not 0"):
        ParallelConfig(**{field: 0})


def test_sequence_parallelism_on_one_tensor_parallel_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence_parallel=True needs tensor_model_parallel_size > 1"):
        ParallelConfig(sequence_parallel=True)


def test_model_chunks_need_a_pipeline() -> None:
    assert ParallelConfig(virtual_pipeline_model_parallel_size=1).chunks_per_stage == 1
    assert ParallelConfig(pipeline_model_parallel_size=2).chunks_per_stage == 1
    with pytest.raises(ValueError, match="virtual_pipeline_model_parallel_size=2 needs pipeline_model_parallel_size"):
        ParallelConfig(virtual_pipeline_model_parallel_size=2)


def test_unknown_token_dispatchers_are_refused() -> None:
    with pytest.raises(ValueError, match="moe_token_dispatcher='ring' is not one of alltoall, allgather, flex"):
        ParallelConfig(moe_token_dispatcher="ring")
    with pytest.raises(ValueError, match="'flex' needs expert_model_parallel_size > 1"):
        ParallelConfig(moe_token_dispatcher="flex")
    assert ParallelConfig(moe_token_dispatcher="flex", expert_model_parallel_size=2).moe_token_dispatcher == "flex"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap_param_gather": True}, "set use_distributed_optimizer and overlap_grad_reduce too"),
        ({"overlap_param_gather": True, "overlap_grad_reduce": True}, "set use_distributed_optimizer"),
        ({"overlap_param_gather": True, "use_distributed_optimizer": True}, "and overlap_grad_reduce too"),
        ({"bucket_size": 1000}, "without overlap_grad_reduce there are no buckets"),
        ({"bucket_size": 0, "overlap_grad_reduce": True}, "bucket_size must be at least 1"),
    ],
)
def test_overlap_that_would_do_nothing_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**options)


@pytest.mark.parametrize(
    ("sizes", "world_size"),
    [
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 6),
        ({"context_parallel_size": 3}, 4),
        ({"expert_model_parallel_size": 4}, 2),
        ({"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 2),
    ],
)
def test_a_world_that_the_layout_does_not_divide_is_refused(sizes: dict[str, int], world_size: int) -> None:
    with pytest.raises(ValueError, match=f"does not divide the {world_size} ranks"):
        ParallelConfig(**sizes).check_world_size(world_size)


def test_the_configuration_passes_through_omegaconf() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(ParallelConfig()), {"tensor_model_parallel_size": 2})
    assert OmegaConf.to_object(merged) == ParallelConfig(tensor_model_parallel_size=2)


def test_groups_need_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        initialize_model_parallel(ParallelConfig(), seed=1)
    with pytest.raises(RuntimeError, match="initialize_model_parallel first"):
        replica_group()


@pytest.mark.parametrize(
    ("layers", "stages", "others", "shares"),
    [
        (8, 4, {}, [2, 2, 2, 2]),
        (8, 2, {"virtual_pipeline_model_parallel_size": 2}, [4, 4]),
        (94, 4, {"num_layers_in_last_pipeline_stage": 22}, [24, 24, 24, 22]),
        (94, 4, {"num_layers_in_first_pipeline_stage": 23, "num_layers_in_last_pipeline_stage": 23}, [23, 24, 24, 23]),
        (8, 2, {"num_layers_in_first_pipeline_stage": 3}, [3, 5]),
        (8, 2, {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 5}, [3, 5]),
    ],
)
def test_layers_of_stages(layers, stages, others, shares):
    assert ParallelConfig(pipeline_model_parallel_size=stages, **others).layers_of_stages(layers) == shares


@pytest.mark.parametrize(
    ("layers", "stages", "others", "message"),
    [
        (94, 4, {}, "94 layers are left for 4 equal parts"),
        (94, 4, {"num_layers_in_last_pipeline_stage": 23}, "71 layers are left for 3 equal parts"),
        (8, 2, {"num_layers_in_first_pipeline_stage": 8}, "0 layers are left for 1 equal parts"),
        (8, 2, {"num_layers_in_first_pipeline_stage": 9}, "-1 layers are left for 1 equal parts"),
        (
            8,
            2,
            {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 4},
            "1 layers are left for 0 equal parts",
        ),
    ],
)
def test_layers_that_do_not_come_out_are_refused(layers, stages, others, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(pipeline_model_parallel_size=stages, **others).layers_of_stages(layers)


@pytest.mark.parametrize(
    "layout",
    [
        {"num_layers_in_first_pipeline_stage": 1},
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "num_layers_in_last_pipeline_stage": 1,
        },
        {"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 0},
    ],
)
def test_stages_with_numbers_of_their_own_need_a_plain_pipeline(layout):
    with pytest.raises(ConfigError, match="num_layers_in_"):
        ParallelConfig(**layout)
