"""Optimizer state in host memory: the same optimizer, and checkpoints that go on with and without it.

Core's hybrid optimizer looks for what lies on a GPU. Here that is said of the policy's weights, which lie in the buffers of
DistributedDataParallel; everything else is real.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_dppo.training.checkpoint.load import load_checkpoint
from megatron_dppo.training.checkpoint.optimizer_state import optimizer_shards, optimizer_steps
from megatron_dppo.training.config.optimizer_memory import OptimizerMemoryConfig
from megatron_dppo.training.policy.trainable import OptimizerState, TrainablePolicy, build_optimizer
from megatron_dppo.training.policy.update_memory import UpdateMemory
from tests.rank_pool import RankPools
from tests.training.checkpoint.checkpoint_runs import OPTIMIZER, TOTAL_STEPS, exported, save, start, train

LAYOUT = {"use_distributed_optimizer": True}
OFFLOADED = OptimizerMemoryConfig(offload_fraction=1.0)


@contextmanager
def _weights_on_a_gpu(policy: TrainablePolicy) -> Iterator[None]:
    on_gpu = {buffer.param_data.untyped_storage().data_ptr() for chunk in policy.chunks for buffer in chunk.buffers}
    is_cuda = property(lambda tensor: tensor.untyped_storage().data_ptr() in on_gpu)
    with (
        mock.patch.object(torch.Tensor, "is_cuda", is_cuda, create=True),
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
        # Core 0.16 compares the version of a Transformer Engine that is not there.
        mock.patch("megatron.core.optimizer.optimizer_config.is_te_min_version", return_value=False),
    ):
        yield


def _offloaded() -> tuple[TrainablePolicy, OptimizerState]:
    policy, _ = start("qwen3", LAYOUT, torch.bfloat16)
    with _weights_on_a_gpu(policy):
        state = build_optimizer(policy, OPTIMIZER, TOTAL_STEPS, OFFLOADED)
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        assert isinstance(part.optimizer, HybridDeviceOptimizer)
        assert part.optimizer.gpu_optimizer is None
    return policy, state


def _state(state: OptimizerState) -> list[dict[str, torch.Tensor]]:
    return [{name: values.clone() for name, values in s.tensors().items()} for s in optimizer_shards(state.optimizer)]


def _one_step(offloaded: bool) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    policy, state = _offloaded() if offloaded else start("qwen3", LAYOUT, torch.bfloat16)
    before = list(optimizer_shards(state.optimizer))
    assert all(shard.main.dtype is torch.float32 and not shard.state for shard in before)
    train(policy, state, range(1))
    assert optimizer_steps(state.optimizer) == {1}
    return _state(state), exported(policy)


def test_a_step_on_the_host_is_the_same_step(ranks: RankPools) -> None:
    """From the same gradients; another Adam of torch's rounds in another order, a few times 2^-24."""
    offloaded, plain = ranks(2).run(_one_step, True), ranks(2).run(_one_step, False)
    for (got, got_weights), (expected, weights) in zip(offloaded, plain, strict=True):
        assert len(got) == len(expected) > 10
        for one, other in zip(got, expected, strict=True):
            assert one.keys() == other.keys() == {"exp_avg", "exp_avg_sq", "fp32_param"}
            for name, values in other.items():
                torch.testing.assert_close(one[name], values, rtol=2e-6, atol=1e-12)
        # In bf16 a weight that lies between two numbers may go either way, by 2^-8 of itself.
        for name, weight in weights.items():
            torch.testing.assert_close(got_weights[name], weight, rtol=2.0**-7, atol=1e-6)


def _saved(folder: Path) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    policy, state = _offloaded()
    train(policy, state, range(3))
    save(folder, policy, state, 3)
    kept = _state(state)
    return train(policy, state, range(3, 8)), kept


def _resumed(folder: Path, offloaded: bool) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    policy, state = _offloaded() if offloaded else start("qwen3", LAYOUT, torch.bfloat16)
    load_checkpoint(folder / "step_00000003", policy, state)
    assert optimizer_steps(state.optimizer) == {3}
    kept = _state(state)
    return train(policy, state, range(3, 8)), kept


def test_a_checkpoint_goes_on_offloaded_or_not(ranks: RankPools, tmp_path: Path) -> None:
    saved = ranks(2).run(_saved, tmp_path)
    again, plain = (ranks(2).run(_resumed, tmp_path, offloaded) for offloaded in (True, False))
    for (losses, kept), (losses_again, kept_again), (losses_plain, kept_plain) in zip(saved, again, plain, strict=True):
        for one, other, third in zip(kept, kept_again, kept_plain, strict=True):
            for name, values in one.items():
                assert torch.equal(values, other[name]), name
                assert torch.equal(values, third[name]), name
        assert losses_again == losses
        assert losses_plain == pytest.approx(losses, rel=1e-2)  # bf16 weights that round the other way


def _put_away() -> tuple[int, bool]:
    policy, state = _offloaded()
    train(policy, state, range(1))
    memory = UpdateMemory(policy, state)
    with mock.patch.object(memory, "_is_on_device", return_value=False):  # on a GPU nothing of the state would be
        memory.put_away()
    report: Any = memory.report
    memory.bring_back()
    return report.moved, bool(torch.tensor(train(policy, state, range(1, 2))).isfinite().all())


def test_what_is_on_the_host_is_not_moved_there(ranks: RankPools) -> None:
    assert ranks(1).run(_put_away) == [(0, True)]
