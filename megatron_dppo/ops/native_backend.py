"""The compiled backend, CPU and CUDA: one read of the logits forward, one read and one write backward, nothing else kept.

The operators are ``torch.ops.megatron_dppo.*`` (csrc/binding.cpp, which checks every argument). They compute what
``ops/torch_backend.py`` and ``ops/shard_merge.py`` define, in fp32; here they get those modules' signatures, and the
shapes that torch.compile and torch.export ask for. Importing this module fails with ImportError where the extension is
not built.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

# Not `from megatron_dppo import _C`: backends.py tells a missing extension by ModuleNotFoundError.
import megatron_dppo._C as _C
from megatron_dppo.ops.shard_merge import MergedRows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda") if _C.cuda_archs else ("cpu",)

_operators = torch.ops.megatron_dppo


def shard_partials(
    logits_NV: torch.Tensor,
    rows: torch.Tensor | None,
    target_n: torch.Tensor,
    topk_ids_nK: torch.Tensor | None,
    temperature: float,
    first_column: int,
    num_columns: int,
) -> torch.Tensor:
    """See torch_backend.shard_partials."""
    topk_ids_nK = None if topk_ids_nK is None else topk_ids_nK.contiguous()
    return _operators.row_partials(
        logits_NV, rows, None, target_n.contiguous(), topk_ids_nK, temperature, first_column, num_columns
    )


def merge_shards(partials_RnC: torch.Tensor) -> MergedRows:
    """See shard_merge.merge_shards."""
    return MergedRows(*_operators.merge_partials(partials_RnC, None))


def shard_gradient(
    logits_NV: torch.Tensor,
    grad_NV: torch.Tensor,
    rows: torch.Tensor | None,
    target_n: torch.Tensor,
    max_n: torch.Tensor,
    log_sum_n: torch.Tensor,
    log_prob_n: torch.Tensor,
    entropy_n: torch.Tensor,
    grad_log_prob_n: torch.Tensor | None,
    grad_entropy_n: torch.Tensor | None,
    temperature: float,
    first_column: int,
    num_columns: int,
) -> None:
    """See torch_backend.shard_gradient. A row whose incoming gradients are both 0 is zero-filled without being read."""
    mask, total = None, logits_NV.shape[0]
    if rows is not None:
        mask = torch.zeros(total, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)
        target_n = target_n.new_zeros(total).index_copy_(0, rows, target_n)
    coefficients = [
        None
        if values is None
        else (values.contiguous() if rows is None else values.new_zeros(total).index_copy_(0, rows, values))
        for values in (max_n, log_sum_n, log_prob_n, entropy_n, grad_log_prob_n, grad_entropy_n)
    ]
    arguments = (mask, target_n.contiguous(), *coefficients, temperature, first_column, num_columns)
    if grad_NV is logits_NV:  # an operator must not get one tensor both to read and, under another name, to write
        _operators.policy_backward_(logits_NV, *arguments)
    else:
        _operators.policy_backward(logits_NV, grad_NV, *arguments)


def shard_divergence(
    kind: Literal["tv", "kl"],
    policy_logits_NV: torch.Tensor,
    rollout_logits_NV: torch.Tensor,
    rows: torch.Tensor | None,
    policy: MergedRows,
    rollout: MergedRows,
    known_ids_nS: torch.Tensor | None,
    known_log_prob_nS: torch.Tensor | None,
    log_rescale_n: torch.Tensor | None,
    temperature: float,
    first_column: int,
    num_columns: int,
) -> torch.Tensor:
    """See torch_backend.shard_divergence."""
    return _operators.shard_divergence(
        policy_logits_NV,
        rollout_logits_NV,
        rows,
        None,
        policy.max,
        policy.log_sum,
        rollout.max,
        rollout.log_sum,
        None if known_ids_nS is None else known_ids_nS.contiguous(),
        None if known_log_prob_nS is None else known_log_prob_nS.contiguous(),
        log_rescale_n,
        kind,
        temperature,
        first_column,
        num_columns,
    )


@torch.library.register_fake("megatron_dppo::row_partials")
def _(logits, rows, mask, target, topk_ids, temperature, first_column, num_columns):  # type: ignore[no-untyped-def]
    topk = 0 if topk_ids is None else topk_ids.shape[1]
    return logits.new_empty(target.shape[0], 5 + topk, dtype=torch.float32)


@torch.library.register_fake("megatron_dppo::merge_partials")
def _(partials, mask):  # type: ignore[no-untyped-def]
    n = partials.shape[1]
    log_prob, entropy, collision, maximum, log_sum = (partials.new_empty(n) for _ in range(5))
    return log_prob, entropy, collision, partials.new_empty(n, partials.shape[2] - 5), maximum, log_sum


@torch.library.register_fake("megatron_dppo::policy_backward")
def _(logits, grad, *others):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("megatron_dppo::policy_backward_")
def _(logits, *others):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("megatron_dppo::shard_divergence")
def _(logits, rollout_logits, rows, mask, max, *others):  # type: ignore[no-untyped-def]
    return torch.empty_like(max)


@torch.library.register_fake("megatron_dppo::token_objective")
def _(log_mu, *others, **settings):  # type: ignore[no-untyped-def]
    coefficient, weight, divergence = (torch.empty_like(log_mu) for _ in range(3))
    constants: Any = _C.metric_constants
    decades = constants["histogram_highest"] - constants["histogram_lowest"]
    histogram = log_mu.new_empty(decades * constants["histogram_bins_per_decade"] + 2, dtype=torch.int64)
    return coefficient, weight, divergence, log_mu.new_empty(len(_C.total_names), dtype=torch.float64), histogram
