"""fp32 logits of a bf16 policy on any layout: those of its own hidden states and weight, with every parameter's gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dppo import vocab_parallel_policy_stats
from megatron_dppo.ops.fused_linear import fused_linear_policy_stats
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rank_pool import RankPools

EPS, HALF_UNIT = 2.0**-24, 2.0**-8  # half a unit of fp32 and of bf16, relative
ROUTES = ("bf16 logits", "logits", "logits, added to main_grad at once", "fused")


def _run(folder: str, layout: dict[str, Any], route: str) -> tuple[float, dict[str, torch.Tensor]]:
    """(worst error of a logit, in units of what fp32 allows; main gradients of two micro-batches' statistics)."""
    # Imported here: the ranks of other tests of this folder start much faster without Megatron.
    from megatron.core.distributed import finalize_model_grads

    from megatron_dppo.models.policy_head import PolicyHead, hidden_states_only
    from tests.models.policy_runs import LOSS_MASK, TOKENS, wrapped_policy

    (chunk,) = wrapped_policy(folder, layout, torch.bfloat16, fp32_head=route != "bf16 logits")
    chunk.zero_grad_buffer()
    head = PolicyHead(chunk)
    if route == "logits, added to main_grad at once":
        head._gradient_accumulation_fusion = True  # which models have on CUDA only
    positions, target = torch.arange(TOKENS.shape[1]).expand_as(TOKENS), TOKENS.roll(-1, dims=1)
    worst = 0.0
    for mask in (LOSS_MASK, LOSS_MASK.flip(0)):
        with hidden_states_only(chunk):
            output = chunk(TOKENS, positions, None)
        hidden_nh = head.response_hidden(output, mask.flatten().nonzero()[:, 0], mask.shape)
        common = {"vocab_size": 250, "tp_group": head.tp_group}
        if route == "fused":
            stats = fused_linear_policy_stats(
                hidden_nh,
                head.weight,
                target[mask],
                **common,
                reduce_hidden_grad=False,
                accumulate_into_main_grad=True,
                fp32_logits=head.fp32_logits,
                chunk_bytes=4 * 500,
            )
        else:
            logits_nV = head.logits(hidden_nh)
            worst = max(worst, _error(logits_nV.detach(), hidden_nh.detach(), head.weight.detach()))
            stats = vocab_parallel_policy_stats(logits_nV, target[mask], **common, inplace_backward=True)
        (stats.log_prob.sum() + 0.3 * stats.entropy.sum()).backward()
    finalize_model_grads([chunk])
    return worst, {name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()}


def _error(logits_nV: torch.Tensor, hidden_nh: torch.Tensor, weight_Vh: torch.Tensor) -> float:
    """A sum of h products is off by at most h + 1 roundings of its terms."""
    a, b = hidden_nh.double(), weight_Vh.double().t()
    allowed = (hidden_nh.shape[1] + 1) * EPS * (a.abs() @ b.abs())
    return ((logits_nV.double() - a @ b).abs() / allowed).nan_to_num(0.0).max().item()  # 0 / 0: padding


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(1, {}, id="one rank"),
        pytest.param(2, {"tensor_model_parallel_size": 2}, id="TP2", marks=pytest.mark.slow),
        pytest.param(
            2,
            {"tensor_model_parallel_size": 2, "sequence_parallel": False},
            id="TP2 without sequence parallelism",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_tied"])
def test_logits_are_exact_and_all_routes_have_their_gradients(
    ranks: RankPools, tmp_path: Path, world_size: int, layout: dict[str, Any], kind: str
) -> None:
    folder = str(write_tiny_hf_model(kind, tmp_path))
    bf16, logits, *others = (ranks(world_size).run(_run, folder, layout, route) for route in ROUTES)
    for rank in range(world_size):
        assert logits[rank][0] <= 1.0 < bf16[rank][0]
        expected = logits[rank][1]
        for route in others:
            # A gradient of the hidden states may be rounded to the next number, that of the weight is rounded on one route.
            assert _largest_difference(route[rank][1], expected) <= 2 * HALF_UNIT
        # Logits below 10 move by at most 10 half units, and so do probabilities. A reduction that is left out or done twice
        # is an error of 50 % and more.
        assert _largest_difference(bf16[rank][1], expected) <= 10 * HALF_UNIT
        assert all(gradient.any() for gradient in expected.values())


def _largest_difference(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Over all parameters, relative to the gradient's norm."""
    assert ours.keys() == expected.keys()
    return max(((ours[name] - gradient).norm() / gradient.norm()).item() for name, gradient in expected.items())
