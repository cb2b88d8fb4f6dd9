"""Log-prob, entropy, collision sum and top-K log-probs of a policy, from one read of vocabulary-sharded logits.

What it costs, with L the bytes of this rank's [N, V/TP] logits: forward reads L once, backward reads and writes L once
(in place if asked), and beyond the results two fp32 numbers per token are kept. The tensor-parallel group exchanges ``5 +
K`` numbers per token in one all-gather; backward needs no communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_dppo.ops.backend import choose_backend
from megatron_dppo.ops.shard_merge import gather_shards


class PolicyStats(NamedTuple):
    """What the loss needs to know about the policy at every token; 0 where the token mask is False.

    All are fp32 (fp64 if the logits are). ``log_prob`` and ``entropy`` carry gradient, the others do not.

    Attributes:
        log_prob: [...] log-probability of the target.
        entropy: [...] entropy over the true vocabulary, in nats.
        collision: [...] sum of squared probabilities, i.e. the chance that two draws agree.
        topk_log_prob: [..., K] log-probabilities of ``topk_ids``, or None if none were given.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    collision: torch.Tensor
    topk_log_prob: torch.Tensor | None


@dataclass(frozen=True)
class VocabShard:
    """Which part of the vocabulary this rank's logits are.

    Attributes:
        group: the tensor-parallel group, or None if the logits are whole.
        vocab_size: true size of the whole vocabulary.
        first_column: global id of column 0 of the shard.
        num_columns: columns of the shard that are true vocabulary; padding follows.
    """

    group: dist.ProcessGroup | None
    vocab_size: int
    first_column: int
    num_columns: int


def locate_shard(logits: torch.Tensor, vocab_size: int | None, tp_group: dist.ProcessGroup | None) -> VocabShard:
    """Shard r of the group owns the global columns [r V/TP, (r + 1) V/TP); those from ``vocab_size`` on are padding."""
    rank, world_size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
    width = logits.shape[-1]
    if vocab_size is None:
        vocab_size = width * world_size
    if not 0 < vocab_size <= width * world_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but {world_size} shard(s) of {width} columns hold {width * world_size}. "
            "Pass the true vocabulary size and, if the logits are sharded, tp_group"
        )
    first_column = rank * width
    return VocabShard(tp_group, vocab_size, first_column, max(0, min(width, vocab_size - first_column)))


def vocab_parallel_policy_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    token_mask: torch.Tensor | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> PolicyStats:
    """Statistics of ``softmax(logits / temperature)`` over a vocabulary that may be sharded.

    Args:
        logits: [..., V/TP] this rank's shard; bf16, fp16, fp32 or fp64. A non-contiguous tensor may be copied.
        target: [...] int64 global token ids, already shifted to align with ``logits``; the same on all ranks of the
            group.
        topk_ids: [..., K] int64 global ids whose log-probs are wanted too; the same on all ranks.
        temperature: divides the logits.
        vocab_size: true size of the whole vocabulary; columns beyond it are padding and get gradient 0. None: all
            count.
        tp_group: process group of the shards; None: the logits are whole.
        token_mask: [...] bool, the same on all ranks. Other rows are neither read nor exchanged; results and gradient
            are 0.
        inplace_backward: write the gradient over the logits. Only where nothing else needs the logits' values in
            backward (autograd raises an error if something does).
        backend: auto | cuda | cpu | torch.

    Returns:
        PolicyStats. A row without any finite logit has log-prob NaN.

    Raises:
        ValueError: shapes, dtypes or the shard's place do not fit; a target or top-K id lies outside [0, vocab_size).
        BackendUnavailableError: the backend asked for cannot be used.
    """
    check_arguments("logits", logits, logits.shape[:-1], target, topk_ids, temperature, token_mask)
    shard = locate_shard(logits, vocab_size, tp_group)
    rows, target_n, topk_ids_nK = select_tokens(target, topk_ids, token_mask, shard.vocab_size)
    log_prob, entropy, collision, topk_log_prob = _PolicyStatsFunction.apply(
        logits,
        target_n,
        topk_ids_nK,
        rows,
        shard,
        float(temperature),
        inplace_backward,
        choose_backend(backend, logits),
    )
    return PolicyStats(log_prob, entropy, collision, None if topk_ids is None else topk_log_prob)


class _PolicyStatsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target_n: torch.Tensor,
        topk_ids_nK: torch.Tensor | None,
        rows: torch.Tensor | None,
        shard: VocabShard,
        temperature: float,
        inplace: bool,
        backend: ModuleType,
    ) -> tuple[torch.Tensor, ...]:
        logits_NV, shape = as_matrix(logits), logits.shape[:-1]
        partials = backend.shard_partials(
            logits_NV, rows, target_n, topk_ids_nK, temperature, shard.first_column, shard.num_columns
        )
        merged = backend.merge_shards(gather_shards(partials, shard.group))

        log_prob, entropy, collision, topk_log_prob = (
            spread_rows(values, rows, logits_NV.shape[0]).view(*shape, *values.shape[1:]) for values in merged[:4]
        )
        # If the logits could not be viewed as a matrix, keep the copy: it is what an in-place gradient may overwrite.
        kept = logits if logits_NV.data_ptr() == logits.data_ptr() else logits_NV
        ctx.save_for_backward(kept, target_n, rows, merged.max, merged.log_sum, log_prob, entropy)
        ctx.logits_shape = logits.shape
        ctx.shard, ctx.temperature, ctx.inplace, ctx.backend = shard, temperature, inplace, backend
        ctx.mark_non_differentiable(collision, topk_log_prob)
        ctx.set_materialize_grads(False)
        return log_prob, entropy, collision, topk_log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any) -> Any:
        if grad_log_prob is None and grad_entropy is None:
            return (None,) * 8
        kept, target_n, rows, max_n, log_sum_n, log_prob, entropy = ctx.saved_tensors
        logits_NV = kept.detach().view(-1, kept.shape[-1])
        grad_NV = logits_NV if ctx.inplace else torch.empty_like(logits_NV)
        if rows is not None:
            _zero_other_rows(grad_NV, rows)
        ctx.backend.shard_gradient(
            logits_NV,
            grad_NV,
            rows,
            target_n,
            max_n,
            log_sum_n,
            take_rows(log_prob.reshape(-1), rows),
            take_rows(entropy.reshape(-1), rows),
            None if grad_log_prob is None else take_rows(grad_log_prob.reshape(-1), rows),
            None if grad_entropy is None else take_rows(grad_entropy.reshape(-1), rows),
            ctx.temperature,
            ctx.shard.first_column,
            ctx.shard.num_columns,
        )
        return (grad_NV.view(ctx.logits_shape), *(None,) * 7)


def as_matrix(logits: torch.Tensor) -> torch.Tensor:
    """[..., V/TP] -> [N, V/TP] with adjacent columns; a view wherever the strides allow it, else a copy."""
    logits_NV = logits.reshape(-1, logits.shape[-1])
    return logits_NV if logits_NV.stride(-1) == 1 else logits_NV.contiguous()


def select_rows(token_mask: torch.Tensor | None) -> torch.Tensor | None:
    """[n] int64 flat indices of the rows that matter; None for all of them."""
    return None if token_mask is None else token_mask.reshape(-1).nonzero()[:, 0]


def select_tokens(
    target: torch.Tensor, topk_ids: torch.Tensor | None, token_mask: torch.Tensor | None, vocab_size: int
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """The mask's rows, their targets [n] and their top-K ids [n, K]; ValueError for an id outside the vocabulary."""
    rows = select_rows(token_mask)
    target_n = take_rows(target.reshape(-1), rows)
    check_ids("target", target_n[:, None], rows, target.shape, vocab_size)
    if topk_ids is None:
        return rows, target_n, None
    topk_ids_nK = take_rows(topk_ids.reshape(target.numel(), topk_ids.shape[-1]), rows)
    check_ids("topk_ids", topk_ids_nK, rows, target.shape, vocab_size)
    return rows, target_n, topk_ids_nK


def take_rows(values_N: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """[N, ...] -> [n, ...]."""
    return values_N if rows is None else values_N.index_select(0, rows)


def check_ids(name: str, ids_nK: torch.Tensor, rows: torch.Tensor | None, shape: torch.Size, vocab_size: int) -> None:
    """Raise ValueError for the first of n selected positions (of a tensor of ``shape``) with an id outside the vocabulary."""
    bad_n = ((ids_nK < 0) | (ids_nK >= vocab_size)).any(dim=1)
    if not bool(bad_n.any()):
        return
    first = int(bad_n.nonzero()[0, 0])
    flat = torch.tensor(first) if rows is None else rows[first].cpu()
    position = [int(i) for i in torch.unravel_index(flat, shape)]
    raise ValueError(f"{name} at {position} is {ids_nK[first].tolist()}: ids must lie in [0, {vocab_size})")


def check_arguments(
    of: str,
    features: torch.Tensor,
    expected: torch.Size,
    target: torch.Tensor,
    topk_ids: torch.Tensor | None,
    temperature: float,
    token_mask: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the others fit ``features``: the logits or hidden states (``of``) of ``expected`` tokens."""
    if features.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"{of} must be bf16, fp16, fp32 or fp64, not {features.dtype}")
    given = {"target": target, "topk_ids": topk_ids, "token_mask": token_mask}
    for name, tensor in given.items():
        if tensor is None:
            continue
        shape = tuple(tensor.shape[:-1] if name == "topk_ids" else tensor.shape)
        if shape != tuple(expected):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; {of} {tuple(features.shape)} ask for {tuple(expected)}"
            )
        wanted = torch.bool if name == "token_mask" else torch.int64
        if tensor.dtype != wanted:
            raise ValueError(f"{name} must be {wanted}, not {tensor.dtype}")
        if tensor.device != features.device:
            raise ValueError(f"{name} is on {tensor.device}, {of} on {features.device}")
    if not (temperature > 0 and temperature < float("inf")):
        raise ValueError(f"temperature must be positive and finite, not {temperature}")


def spread_rows(values_n: torch.Tensor, rows: torch.Tensor | None, total: int) -> torch.Tensor:
    """[n, ...] -> [N, ...] with 0 in the other rows."""
    if rows is None:
        return values_n.contiguous()
    return values_n.new_zeros(total, *values_n.shape[1:]).index_copy_(0, rows, values_n)


def _zero_other_rows(grad_NV: torch.Tensor, rows: torch.Tensor) -> None:
    other = torch.ones(grad_NV.shape[0], dtype=torch.bool, device=grad_NV.device).index_fill_(0, rows, False)
    grad_NV.index_fill_(0, other.nonzero()[:, 0], 0.0)
