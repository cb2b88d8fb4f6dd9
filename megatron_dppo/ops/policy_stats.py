"""Log-prob, entropy, collision sum and top-K log-probs of a policy, from one read of vocabulary-sharded logits.

What it costs, with L the bytes of this rank's [N, V/TP] logits: forward reads L once, backward reads and writes L once
(in place if asked), and beyond the results two fp32 numbers per token are kept. The tensor-parallel group exchanges ``5 +
K`` numbers per token in one all-gather; backward needs no communication.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_dppo.ops.arguments import (
    RowSelection,
    RowState,
    TokenIds,
    VocabShard,
    as_matrix,
    check_ids,
    check_rows_apart,
    check_temperature,
    select,
)
from megatron_dppo.ops.backend import Reduction, choose_backend
from megatron_dppo.ops.layout_reduction import choose_reduction
from megatron_dppo.ops.shard_merge import gather_shards
from megatron_dppo.ops.tile_tree import Deterministic


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

    def detach(self) -> PolicyStats:
        """The same values without gradient."""
        return PolicyStats(self.log_prob.detach(), self.entropy.detach(), self.collision, self.topk_log_prob)

    def flatten(self) -> PolicyStats:
        """[N] (and [N, K])."""
        topk = self.topk_log_prob
        return PolicyStats(
            self.log_prob.reshape(-1),
            self.entropy.reshape(-1),
            self.collision.reshape(-1),
            None if topk is None else topk.reshape(self.log_prob.numel(), topk.shape[-1]),
        )


def vocab_parallel_policy_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    topk_ids: torch.Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    token_mask: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
    deterministic: Deterministic = "off",
    checks: Literal["now", "off"] = "now",
) -> PolicyStats:
    """Statistics of ``softmax(logits / temperature)`` over a vocabulary that may be sharded.

    Which tokens matter is said by ``token_mask`` or, where the caller knows their positions, by ``rows``; the others are
    neither read nor do they get a gradient other than 0.

    Args:
        logits: [..., V/TP] this rank's shard; bf16, fp16, fp32 or fp64. A non-contiguous tensor may be copied.
        target: [...] int64 global token ids, already shifted to align with ``logits``; the same on all ranks of the
            group. [n] with ``rows``.
        topk_ids: [..., K] int64 global ids whose log-probs are wanted too; the same on all ranks. [n, K] with ``rows``.
        temperature: divides the logits.
        vocab_size: true size of the whole vocabulary; columns beyond it are padding and get gradient 0. None: all
            count.
        tp_group: process group of the shards; None: the logits are whole.
        token_mask: [...] bool, the same on all ranks. The results of the other tokens are 0.
        rows: [n] int64 distinct positions in the flattened [...], the same on all ranks. All results are [n].
        inplace_backward: write the gradient over the logits. Only where nothing else needs the logits' values in
            backward (autograd raises an error if something does), and where no two rows share memory.
        backend: auto | cuda | cpu | torch.
        deterministic: off: sums in the order of the shards. layout: the same bits however many ranks share the vocabulary,
            however the rows lie and with any number of threads, on one backend (``ops/tile_tree.py``; docs/kernels.md says
            what it costs).
        checks: now: an id outside the vocabulary is an error here, for which this call waits for the device. off: ids are
            the caller's promise, and nothing is waited for.

    Returns:
        PolicyStats. A row without any finite logit has log-prob NaN.

    Raises:
        ValueError: shapes, dtypes or the shard's place do not fit; a target or top-K id lies outside [0, vocab_size).
        BackendUnavailableError: the backend asked for cannot be used.
    """
    selection, ids, shape = select("logits", logits, logits.shape[:-1], target, topk_ids, token_mask, rows)
    check_temperature(temperature)
    shard = VocabShard.locate(logits.shape[-1], vocab_size, tp_group)
    if checks == "now":
        check_ids(ids, selection, shape, shard.vocab_size)
    # Autograd gives the gradient the shape of the logits again. Where they had to be copied, it is the copy that is kept, and
    # that a gradient in place overwrites.
    logits_NV = as_matrix(logits)
    if inplace_backward:
        check_rows_apart(logits_NV)
    reduction = choose_reduction(
        deterministic, choose_backend(backend, logits), shard, logits_NV.shape[1], float(temperature)
    )
    results = _PolicyStatsFunction.apply(
        logits_NV, *ids, *selection, shard, float(temperature), inplace_backward, reduction
    )
    return shaped_stats(results, shape, has_topk=topk_ids is not None)


def shaped_stats(results_n: tuple[torch.Tensor, ...], shape: torch.Size, has_topk: bool) -> PolicyStats:
    """[n] log-prob, entropy, collision and [n, K] top-K log-probs -> PolicyStats of the tokens' shape."""
    log_prob, entropy, collision, topk_log_prob = (values.view(*shape, *values.shape[1:]) for values in results_n)
    return PolicyStats(log_prob, entropy, collision, topk_log_prob if has_topk else None)


class _PolicyStatsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: torch.Tensor,
        target_n: torch.Tensor,
        topk_ids_nK: torch.Tensor | None,
        rows: torch.Tensor | None,
        mask: torch.Tensor | None,
        shard: VocabShard,
        temperature: float,
        inplace: bool,
        reduction: Reduction,
    ) -> tuple[torch.Tensor, ...]:
        selection = RowSelection(rows, mask)
        ids = TokenIds(target_n, topk_ids_nK)
        partials_nC = reduction.shard_partials(logits_NV, ids, selection, shard, temperature)
        merged = reduction.merge_shards(gather_shards(partials_nC, shard.group), mask)

        ctx.save_for_backward(logits_NV, target_n, rows, mask, *merged.state)
        ctx.shard, ctx.temperature, ctx.inplace, ctx.reduction = shard, temperature, inplace, reduction
        ctx.mark_non_differentiable(merged.collision, merged.topk_log_prob)
        ctx.set_materialize_grads(False)
        return merged.log_prob, merged.entropy, merged.collision, merged.topk_log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any) -> Any:
        if grad_log_prob is None and grad_entropy is None:
            return (None,) * 9
        saved_NV, target_n, rows, mask, *state_n = ctx.saved_tensors
        logits_NV, selection = saved_NV.detach(), RowSelection(rows, mask)
        num_rows = logits_NV.shape[0]
        grad_NV = logits_NV if ctx.inplace else torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        # Every row is written, with 0 where it was not selected: the few numbers of each row are spread out for that.
        ctx.reduction.shard_gradient(
            logits_NV,
            grad_NV,
            selection.spread(target_n, num_rows),
            selection.as_mask(num_rows),
            RowState(*(selection.spread(values_n, num_rows) for values_n in state_n)),
            None if grad_log_prob is None else selection.spread(grad_log_prob, num_rows),
            None if grad_entropy is None else selection.spread(grad_entropy, num_rows),
            ctx.shard,
            ctx.temperature,
        )
        return (grad_NV, *(None,) * 8)
