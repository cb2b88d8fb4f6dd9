"""What only an update needs can leave the device in between, and the numbers are those of a run in which it stayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_dppo.training.checkpoint.optimizer_state import optimizer_shards
from megatron_dppo.training.policy.frozen_weights import FrozenWeights
from megatron_dppo.training.policy.trainable import OptimizerState, TrainablePolicy
from megatron_dppo.training.policy.update_memory import UpdateMemory
from tests.training.checkpoint.checkpoint_runs import exported, save, start, stored_tensors, train

STEPS = 4
# Plain and distributed optimizers, with fp32 main parameters and without, one and two of them (experts have their own),
# several chunks.
LAYOUTS = [
    pytest.param("qwen3_tied", {}, torch.float32, id="DP2"),
    pytest.param("qwen3_moe", {"expert_model_parallel_size": 2}, torch.bfloat16, id="EP2, bf16"),
    pytest.param("qwen3_moe", {"use_distributed_optimizer": True}, torch.bfloat16, id="DP2 distributed, bf16"),
    pytest.param("qwen3_tied", {"use_distributed_optimizer": True}, torch.float32, id="DP2 distributed"),
    pytest.param(
        "qwen3_tied",
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        torch.bfloat16,
        id="PP2 VPP2, bf16",
    ),
]


def _steps(
    policy: TrainablePolicy, optimizer_state: OptimizerState, memory: UpdateMemory | None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    for step in range(STEPS):
        if memory is not None:
            memory.put_away()
            memory.put_away()  # as if nothing was asked
            memory.bring_back()
            memory.bring_back()
            for on_host in memory._on_host.values():
                on_host.fill_(float("nan"))  # nobody may still read it
        losses += train(policy, optimizer_state, range(step, step + 1))
    return losses, exported(policy)


def _with_and_without(kind: str, layout: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    stayed = _steps(*start(kind, layout, dtype), None)
    parallel_state.destroy_model_parallel()
    policy, optimizer_state = start(kind, layout, dtype)
    return stayed, _steps(policy, optimizer_state, UpdateMemory(policy, optimizer_state))


@pytest.mark.parametrize(("kind", "layout", "dtype"), LAYOUTS)
def test_training_goes_on_to_the_bit(kind, layout, dtype, ranks):
    for (losses, weights), (losses_after, weights_after) in ranks(2).run(_with_and_without, kind, layout, dtype):
        assert losses_after == losses
        assert losses[0] != losses[-1]
        assert weights.keys() == weights_after.keys()
        assert [name for name in weights if not torch.equal(weights[name], weights_after[name])] == []


def _put_away(kind: str, layout: dict[str, Any], dtype: torch.dtype) -> tuple[Any, int, int, bool]:
    """(what is reported, elements that are updated here, elements of gradients, whether they are really elsewhere)."""
    policy, optimizer_state = start(kind, layout, dtype)
    train(policy, optimizer_state, range(2))
    memory = UpdateMemory(policy, optimizer_state)
    updated = sum(shard.main.numel() for shard in optimizer_shards(optimizer_state.optimizer))
    gradients = [
        buffer.grad_data for chunk in policy.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    before = {shard.state["exp_avg"].data_ptr() for shard in optimizer_shards(optimizer_state.optimizer)}
    memory.put_away()
    after = {shard.state["exp_avg"].data_ptr() for shard in optimizer_shards(optimizer_state.optimizer)}
    is_elsewhere = not before & after and all(grad.untyped_storage().nbytes() == 0 for grad in gradients)
    return memory.report, updated, sum(gradient.numel() for gradient in gradients), is_elsewhere


@pytest.mark.parametrize(("kind", "layout", "dtype"), LAYOUTS[1:3])
def test_all_that_leaves_and_stays_is_counted(kind, layout, dtype, ranks):
    """Of a bf16 policy two moments and a main parameter in fp32 for each element updated here, and fp32 gradients of all."""
    for report, updated, gradients, is_elsewhere in ranks(2).run(_put_away, kind, layout, dtype):
        assert is_elsewhere
        assert report.moved == 12 * updated
        assert report.dropped == 4 * gradients
        # The buffers are padded to be cut among ranks; weights are not.
        assert 0 < report.stays <= 2 * gradients


def _saved_while_away(folder: str) -> tuple[Path, Path]:
    policy, optimizer_state = start("qwen3_moe", {"use_distributed_optimizer": True}, torch.bfloat16)
    train(policy, optimizer_state, range(2))
    there = save(Path(folder) / "there", policy, optimizer_state, 2)
    UpdateMemory(policy, optimizer_state).put_away()
    return there, save(Path(folder) / "away", policy, optimizer_state, 2)


def test_a_checkpoint_can_be_saved_while_it_is_away(ranks, tmp_path):
    there, away = (stored_tensors(path) for path in ranks(2).run(_saved_while_away, str(tmp_path))[0])
    assert there.keys() == away.keys()
    assert any(name.startswith("optimizer.exp_avg") for name in there)
    assert [name for name in there if not torch.equal(there[name], away[name])] == []


def _frozen() -> tuple[int, int, bool]:
    policy, _ = start("qwen3_tied", {}, torch.float32)
    frozen = FrozenWeights(policy.chunks)
    kept = [tensor.clone() for tensor in frozen.tensors]
    memory = UpdateMemory(policy, frozen=[frozen])
    memory.put_away()
    moved = memory.report.moved
    memory.bring_back()
    same = all(torch.equal(tensor, before) for tensor, before in zip(frozen.tensors, kept, strict=True))
    return moved, sum(tensor.nbytes for tensor in kept), same


def test_frozen_weights_leave_as_well(ranks):
    ((moved, size, same),) = ranks(1).run(_frozen)
    assert moved == size > 0
    assert same
