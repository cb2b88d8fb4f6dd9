"""A checkpoint belongs to no layout: any layout reads what any other wrote, down to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.training.checkpoint.checkpoint_runs import (
    resume_and_go_on,
    start,
    stored_tensors,
    train,
    train_save_and_go_on,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHECKPOINT = "step_00000003"
DISTRIBUTED = {"use_distributed_optimizer": True}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype is b[name].dtype and torch.equal(a[name], b[name]) for name in a)


TP2, PP2, EP2 = ({f"{what}_model_parallel_size": 2} for what in ("tensor", "pipeline", "expert"))
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
MOE = [(2, {**EP2, **DISTRIBUTED}), (2, {**TP2, **EP2}), (2, VPP2), (1, {})]
# Both stages have the embedding and shard it over their own data-parallel groups.
TIED = [(2, DISTRIBUTED), (2, TP2), (4, {**PP2, **DISTRIBUTED})]
MORE_MOE = [
    *((1, DISTRIBUTED), (2, {"context_parallel_size": 2, **DISTRIBUTED}), (4, {**EP2, **DISTRIBUTED})),
    *((4, {**TP2, **PP2, **EP2}), (2, {**TP2, "expert_tensor_parallel_size": 2}), (1, {})),
]
MORE_TIED = [(1, {}), (4, {**TP2, **DISTRIBUTED}), (2, PP2)]


@pytest.mark.parametrize(
    ("kind", "dtype", "layouts"),
    [
        pytest.param("qwen3_moe", torch.float32, MOE, id="moe fp32"),
        pytest.param("qwen3_tied", torch.bfloat16, TIED, id="tied bf16"),
        pytest.param(
            "qwen3_moe", torch.float32, [MOE[-1], *MOE[:3], *MORE_MOE], id="moe fp32, more", marks=pytest.mark.nightly
        ),
        pytest.param("qwen3_tied", torch.bfloat16, TIED + MORE_TIED, id="tied bf16, more", marks=pytest.mark.nightly),
    ],
)
def test_any_layout_goes_on_from_any_other(ranks, tmp_path, kind, dtype, layouts):
    """Each layout loads the checkpoint of the one before and writes its own: all of them hold the same bits."""
    (count, layout), *others = layouts
    (saved, losses, _), *_ = ranks(count).run(train_save_and_go_on, kind, layout, dtype, tmp_path / "0")
    original = stored_tensors(tmp_path / "0" / CHECKPOINT)
    assert losses[-1] < 0.95 * losses[0]
    for number, (count, layout) in enumerate(others, start=1):
        source, copy = tmp_path / str(number - 1) / CHECKPOINT, tmp_path / str(number)
        for weights, resumed, _ in ranks(count).run(resume_and_go_on, kind, layout, dtype, source, copy):
            assert same_bits(weights, saved), layout
            if dtype is torch.float32:
                # Sums in another order change a loss by some 1e-7 at each step; a moment, a step count or a rate that is
                # not restored by 1e-3.
                assert resumed == pytest.approx(losses, rel=1e-5), layout
        assert same_bits(stored_tensors(copy / CHECKPOINT), original), layout


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param({**EP2, **DISTRIBUTED}, torch.bfloat16, id="EP2 distributed bf16"),
        pytest.param(VPP2, torch.float32, id="PP2 VPP2"),
        # Of fp32: test_killed_runs.py in tests/training.
        pytest.param({**TP2, **EP2}, torch.bfloat16, id="TP2 EP2 bf16", marks=pytest.mark.nightly),
        pytest.param(EP2, torch.float32, id="EP2", marks=pytest.mark.nightly),
        pytest.param({**EP2, **DISTRIBUTED}, torch.float32, id="EP2 distributed", marks=pytest.mark.nightly),
    ],
)
def test_the_same_layout_goes_on_bit_for_bit(ranks, tmp_path, layout, dtype):
    whole = ranks(2).run(train_save_and_go_on, "qwen3_moe", layout, dtype, tmp_path)
    resumed = ranks(2).run(resume_and_go_on, "qwen3_moe", layout, dtype, tmp_path / CHECKPOINT)
    for (saved, losses, final), (loaded, losses_after, final_after) in zip(whole, resumed, strict=True):
        assert same_bits(loaded, saved)
        assert losses_after == losses
        assert same_bits(final_after, final)


def _train(kind: str, layout: dict[str, Any], dtype: torch.dtype) -> list[float]:
    return train(*start(kind, layout, dtype), range(6))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param(EP2, torch.bfloat16, id="DP2 EP2 bf16"),
        pytest.param(EP2, torch.float32, id="DP2 EP2 fp32", marks=pytest.mark.nightly),
        pytest.param({}, torch.bfloat16, id="DP2 bf16", marks=pytest.mark.nightly),
        pytest.param({}, torch.float32, id="DP2 fp32", marks=pytest.mark.nightly),
        pytest.param(TP2, torch.float32, id="TP2 fp32", marks=pytest.mark.nightly),
        pytest.param(TP2, torch.bfloat16, id="TP2 bf16", marks=pytest.mark.nightly),
    ],
)
def test_the_distributed_optimizer_takes_the_same_steps(ranks, layout, dtype):
    """Each element of a gradient is the same sum of two ranks' gradients, and Adam works element by element.

    Only the gradient norm, by which gradients are clipped, is summed in another order: 1e-7 in fp32; in bf16 weights it
    decides now and then about the rounding of a weight (2^-9).
    """
    plain = ranks(2).run(_train, "qwen3_moe", layout, dtype)
    distributed = ranks(2).run(_train, "qwen3_moe", {**layout, **DISTRIBUTED}, dtype)
    assert distributed[0] == pytest.approx(plain[0], rel=1e-6 if dtype is torch.float32 else 1e-3)
