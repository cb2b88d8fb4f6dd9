"""A call that computes from hidden states and an output layer's weight: its arguments checked, and what follows from them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from megatron_dppo.ops.arguments import RowSelection, TokenIds, VocabShard, check_ids, check_temperature, select
from megatron_dppo.ops.backend import choose_backend
from megatron_dppo.ops.fp32_product import is_16_bit
from megatron_dppo.ops.layout_products import BLOCK_ROWS
from megatron_dppo.ops.layout_reduction import LayoutReduction, choose_reduction
from megatron_dppo.ops.linear_tiles import LinearPlan, Tiling
from megatron_dppo.ops.tile_tree import Deterministic

CHUNK_BYTES = 64 * 2**20


class LinearCall(NamedTuple):
    """What is computed of which tokens.

    Attributes:
        ids: of the tokens that are computed, and
        selection: which these are; with ``order`` the mask is in that order too.
        shape: of the results.
        plan: how.
        order: [N] int64 position of each computed token in ``shape``, where it is not its own; or None.
    """

    ids: TokenIds
    selection: RowSelection
    shape: torch.Size
    plan: LinearPlan
    order: torch.Tensor | None

    def compact(self) -> LinearCall:
        """Those inside the mask first, in their order, as if there were no others: blocks of tokens are then the same."""
        mask = self.selection.mask
        assert mask is not None
        order = torch.argsort(~mask, stable=True)
        topk = None if self.ids.topk is None else self.ids.topk[order]
        ids = TokenIds(self.ids.target[order], topk)
        return LinearCall(ids, RowSelection(order, mask[order]), self.shape, self.plan, order)

    def in_place(self, values_N: torch.Tensor) -> torch.Tensor:
        """[N, ...] of the computed tokens -> in the order of ``shape``."""
        return values_N if self.order is None else RowSelection(self.order).spread(values_N, len(self.order))


def linear_call(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    topk_ids: torch.Tensor | None,
    temperature: float,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    token_mask: torch.Tensor | None,
    rows: torch.Tensor | None,
    sequence_parallel: bool,
    reduce_hidden_grad: bool,
    accumulate_into_main_grad: bool,
    fp32_logits: bool,
    chunk_bytes: int,
    backend: str,
    deterministic: Deterministic,
    checks: Literal["now", "off"],
) -> LinearCall:
    """The arguments are those of ``fused_linear_policy_stats``, and so are the errors."""
    world_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    _check_linear(hidden, weight, sequence_parallel, tp_group, reduce_hidden_grad, chunk_bytes)
    if accumulate_into_main_grad and not hasattr(weight, "main_grad"):
        raise ValueError(
            "accumulate_into_main_grad=True, but the weight has no main_grad: wrap the model in Megatron's "
            "DistributedDataParallel first, and pass the parameter itself"
        )
    shape = hidden.shape[:-1]
    if sequence_parallel:
        shape = torch.Size((shape[0] * world_size, *shape[1:]))
    selection, ids, result_shape = select("hidden", hidden, shape, target, topk_ids, token_mask, rows)
    check_temperature(temperature)
    shard = VocabShard.locate(weight.shape[0], vocab_size, tp_group)
    if checks == "now":
        check_ids(ids, selection, result_shape, shard.vocab_size)
    n, width = ids.target.shape[0], weight.shape[0]
    reduction = choose_reduction(deterministic, choose_backend(backend, hidden), shard, width, float(temperature))
    tree = reduction.tree if isinstance(reduction, LayoutReduction) else None
    tile_dtype = torch.float32 if fp32_logits and is_16_bit(hidden) else hidden.dtype
    plan = LinearPlan(
        shard=shard,
        world_size=world_size,
        temperature=float(temperature),
        tiling=Tiling.within(chunk_bytes, n, width, tile_dtype)
        if tree is None
        else Tiling(n, width, BLOCK_ROWS, width),
        tile_dtype=tile_dtype,
        reduction=reduction,
        tree=tree,
        sequence_parallel=sequence_parallel and world_size > 1,
        reduce_hidden_grad=reduce_hidden_grad and world_size > 1,
        accumulate_into_main_grad=accumulate_into_main_grad,
    )
    call = LinearCall(ids, selection, result_shape, plan, None)
    return call.compact() if tree is not None and selection.mask is not None else call


def _check_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None,
    reduce_hidden_grad: bool,
    chunk_bytes: int,
) -> None:
    if weight.dim() != 2 or hidden.dim() < 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [..., h] and [V/TP, h] with one h"
        )
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"hidden is {hidden.dtype} on {hidden.device}, weight {weight.dtype} on {weight.device}: they must agree"
        )
    if sequence_parallel and tp_group is None:
        raise ValueError("sequence_parallel=True needs tp_group, over which hidden is split")
    if sequence_parallel and not reduce_hidden_grad:
        raise ValueError(
            "reduce_hidden_grad=False cannot go with sequence_parallel=True, which sums while it scatters: gather the "
            "hidden states before, or leave the reduction on"
        )
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, not {chunk_bytes}")
