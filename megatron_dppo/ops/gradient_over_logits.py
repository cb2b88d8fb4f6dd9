"""A policy gradient from logits in one pass: forward writes it over them.

``ops/policy_stats.py`` reads the logits in forward, and reads and writes them in backward, because what multiplies a token's
gradient is known to the loss only. Where that is the weighted w r A of ``token_objective``, the kernel can compute it itself
as soon as it has read a token's row, and go on to the gradient while the row is still in a cache: one read and one write of
the logits as far as the memory is concerned. The bits are those of the two passes, where these take rows whole.

**The promise.** The gradient is finished in forward, so the number that backward will be called with has to be known
(``backward_scale``). Another number is an error, found on the device; so is a second backward.

**Who else reads the logits.** What saved them for its own backward before is stopped by autograd, as they count as modified.
What reads them after the call gets their gradient instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_dppo.ops.arguments import as_matrix, check_rows_apart, check_temperature
from megatron_dppo.ops.backend import Backend
from megatron_dppo.ops.policy_stats import PolicyStats


def gradient_over_logits(
    logits: torch.Tensor,
    *,
    target: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
    topk_log_probs: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    rule: Mapping[str, Any],
    temperature: float,
    vocab_size: int,
    backward_scale: float,
    backend: Backend,
) -> tuple[torch.Tensor, PolicyStats]:
    """Overwrite the logits with the gradient of ``backward_scale`` times the loss, the sum of token_weights * -w r A.

    Args:
        logits: [..., V] of the whole vocabulary, N tokens; bf16, fp16 or fp32, not a leaf.
        target: [N] int64 global ids, inside the vocabulary wherever the mask is True. Not looked at here.
        rollout_log_probs: [N] fp32 and
        advantages: [N] fp32, as for ``token_objective``.
        mask: [N] bool; the gradient of tokens outside is 0. None: all count.
        topk_ids: [N, K] int64, or None: nothing but the sampled token is known.
        topk_log_probs: [N, K] fp32, the engine's.
        token_weights: [N] fp32, or None: 1.
        rule: divergence, direction, trust_region and limits, as the operator ``token_objective`` takes them.
        temperature: divides the logits.
        vocab_size: true columns; those beyond are padding and get gradient 0.
        backward_scale: the number that backward will be called with.
        backend: a compiled one.

    Returns:
        fp32 scalar 0 that carries the gradient, and the statistics [N] (and [N, K]) without gradient, 0 outside the mask.

    Raises:
        ValueError: rows of the logits share memory, or a shape or dtype does not fit.
        RuntimeError: backward was called twice, or with another number than ``backward_scale``.
    """
    check_temperature(temperature)
    logits_NV = as_matrix(logits)
    check_rows_apart(logits_NV)
    tensors = (mask, target, rollout_log_probs, advantages, topk_ids, topk_log_probs, token_weights)
    contiguous = (None if values is None else values.contiguous() for values in tensors)
    numbers = (float(temperature), vocab_size, float(backward_scale))
    zero, log_prob, entropy, collision, topk_log_prob = _GradientOverLogits.apply(
        logits_NV, backend, dict(rule), numbers, *contiguous
    )
    return zero, PolicyStats(log_prob, entropy, collision, None if topk_ids is None else topk_log_prob)


class _GradientOverLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: torch.Tensor,
        backend: Backend,
        rule: dict[str, Any],
        numbers: tuple[float, int, float],
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        assert backend.operators is not None
        stats = backend.operators.policy_gradient_(logits_NV, *tensors, *numbers, **rule)
        ctx.save_for_backward(logits_NV)  # the gradient, from here on
        ctx.scale, ctx.used = numbers[-1], False
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return logits_NV.new_zeros((), dtype=torch.float32), *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor, *_: Any) -> Any:
        if ctx.used:
            raise RuntimeError(
                "backward a second time through a gradient that was written over the logits in forward, and has been handed "
                "out: call the loss again with new logits, or leave backward_scale out"
            )
        ctx.used = True
        torch._assert_async(
            scale == ctx.scale,
            f"backward was called with another number than the promised backward_scale={ctx.scale}: the gradient of the "
            "logits, which was made in forward, is wrong",
        )
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV.detach(), *(None,) * 10
