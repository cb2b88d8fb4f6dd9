"""The compiled backend, CPU and CUDA: one read of the logits forward, one read and one write backward, nothing else kept.

The operators are ``torch.ops.megatron_dppo.*`` (csrc/operators, which check every argument). They compute what
``ops/torch_backend.py`` and ``ops/shard_merge.py`` define, in fp32; here they get the interface of ``ops/backend.py``, and
the shapes that torch.compile and torch.export ask for. Importing this module fails with ImportError where the extension is
not built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

# Not `from megatron_dppo import _C`: backend.py tells a missing extension by ModuleNotFoundError.
import megatron_dppo._C as _C
from megatron_dppo.ops.arguments import KnownColumns, Normaliser, RowSelection, RowState, TokenIds, VocabShard
from megatron_dppo.ops.shard_merge import MergedRows
from megatron_dppo.ops.tile_tree import TileTree

NAMESPACE = "megatron_dppo"  # of the operators
operators = getattr(torch.ops, NAMESPACE)
if not all(hasattr(operators, name) for name in ("policy_gradient_", "tile_nodes", "fp32_product_")):
    raise ImportError("it was built by an older version of this package: build it again")
if not _C.cpu_level_is_supported:
    raise ImportError(
        f"its CPU kernels are for {_C.cpu_level} only, which this processor lacks: build it again without "
        "MEGATRON_DPPO_CPU_LEVEL"
    )

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_LEVEL = _C.cpu_level
# Of the factors of fp32_product_: what this processor has instructions for.
FP32_PRODUCT_DTYPES = tuple(getattr(torch, name) for name in _C.fp32_product_dtypes)
DEVICES = ("cpu", "cuda") if _C.cuda_archs else ("cpu",)


@dataclass(frozen=True)
class NativeBackend:
    """The compiled kernels of one kind of device; ``name`` is ``cpu`` or ``cuda``. The methods are those of ``Backend``."""

    name: str
    namespace: str = NAMESPACE
    dtypes: tuple[torch.dtype, ...] = DTYPES

    @property
    def operators(self) -> Any:
        """See Backend. Looked up at each use, as torch.compile asks for."""
        return getattr(torch.ops, self.namespace)

    def shard_partials(
        self, logits_NV: torch.Tensor, ids: TokenIds, selection: RowSelection, shard: VocabShard, temperature: float
    ) -> torch.Tensor:
        """See torch_backend.shard_partials."""
        return self.operators.row_partials(
            logits_NV,
            selection.rows,
            selection.mask,
            ids.target.contiguous(),
            None if ids.topk is None else ids.topk.contiguous(),
            temperature,
            shard.first_column,
            shard.num_columns,
        )

    def merge_shards(self, partials_RnC: torch.Tensor, mask_n: torch.Tensor | None) -> MergedRows:
        """See shard_merge.merge_shards."""
        return MergedRows(*self.operators.merge_partials(partials_RnC, mask_n))

    def tile_nodes(
        self,
        logits_NV: torch.Tensor,
        ids: TokenIds,
        selection: RowSelection,
        shard: VocabShard,
        tree: TileTree,
        temperature: float,
    ) -> torch.Tensor:
        """See torch_backend.tile_nodes."""
        return self.operators.tile_nodes(
            logits_NV,
            selection.rows,
            selection.mask,
            ids.target.contiguous(),
            None if ids.topk is None else ids.topk.contiguous(),
            temperature,
            shard.first_column,
            shard.num_columns,
            tree.nodes,
        )

    def merge_tile_nodes(
        self, partials_RnC: torch.Tensor, mask_n: torch.Tensor | None, tree: TileTree, temperature: float
    ) -> MergedRows:
        """See torch_backend.merge_tile_nodes."""
        results = self.operators.merge_tile_nodes(partials_RnC, mask_n, temperature, tree.shard_tiles, tree.nodes)
        return MergedRows(*results)

    def shard_gradient(
        self,
        logits_NV: torch.Tensor,
        grad_NV: torch.Tensor,
        target_N: torch.Tensor,
        mask_N: torch.Tensor | None,
        state: RowState,
        grad_log_prob_N: torch.Tensor | None,
        grad_entropy_N: torch.Tensor | None,
        shard: VocabShard,
        temperature: float,
    ) -> None:
        """See torch_backend.shard_gradient. A row whose incoming gradients are both 0 is zero-filled without being read."""
        per_row = (state.max, state.log_sum, state.log_prob, state.entropy, grad_log_prob_N, grad_entropy_N)
        arguments = (
            mask_N,
            target_N.contiguous(),
            *(None if values is None else values.contiguous() for values in per_row),
            temperature,
            shard.first_column,
            shard.num_columns,
        )
        if grad_NV is logits_NV:  # an operator must not get one tensor both to read and, under another name, to write
            self.operators.policy_backward_(logits_NV, *arguments)
        else:
            self.operators.policy_backward(logits_NV, grad_NV, *arguments)

    def shard_divergence(
        self,
        kind: Literal["tv", "kl"],
        policy_NV: torch.Tensor,
        policy: Normaliser,
        rollout_NV: torch.Tensor,
        rollout: Normaliser,
        selection: RowSelection,
        known: KnownColumns | None,
        shard: VocabShard,
        temperature: float,
    ) -> torch.Tensor:
        """See torch_backend.shard_divergence."""
        return self.operators.shard_divergence(
            policy_NV,
            rollout_NV,
            *selection,
            *policy,
            *rollout,
            *((None, None, None) if known is None else (values.contiguous() for values in known)),
            kind,
            temperature,
            shard.first_column,
            shard.num_columns,
        )


def fp32_product_(sums_mn: torch.Tensor, a_mk: torch.Tensor, b_kn: torch.Tensor, *, accumulate: bool) -> None:
    """``sums = a @ b``, or ``+=``, of 16-bit matrices on a CPU, summed in fp32.

    Args:
        sums_mn: [m, n] fp32; rows may have gaps between them.
        a_mk: [m, k] of a dtype of ``FP32_PRODUCT_DTYPES``.
        b_kn: [k, n] of the same dtype.
        accumulate: add to what is there.
    """
    a_mk, b_kn = (values if 1 in values.stride() else values.contiguous() for values in (a_mk, b_kn))
    operators.fp32_product_(sums_mn, a_mk, b_kn, accumulate)


# What each operator returns for tensors without values: shapes and dtypes.


def _row_partials(logits, rows, mask, target, topk_ids, *others):  # type: ignore[no-untyped-def]
    topk = 0 if topk_ids is None else topk_ids.shape[1]
    return logits.new_empty(target.shape[0], 5 + topk, dtype=torch.float32)


def _merge_partials(partials, mask):  # type: ignore[no-untyped-def]
    n = partials.shape[1]
    log_prob, entropy, collision, maximum, log_sum = (partials.new_empty(n) for _ in range(5))
    return log_prob, entropy, collision, partials.new_empty(n, partials.shape[2] - 5), maximum, log_sum


def _tile_nodes(logits, rows, mask, target, topk_ids, temperature, first_column, num_columns, nodes):  # type: ignore[no-untyped-def]
    topk = 0 if topk_ids is None else topk_ids.shape[1]
    return logits.new_empty(target.shape[0], 4 * nodes + 1 + topk, dtype=torch.float32)


def _merge_tile_nodes(partials, mask, temperature, shard_tiles, nodes):  # type: ignore[no-untyped-def]
    return _merge_partials(partials[..., 4 * (nodes - 1) :], mask)


def _shard_divergence(logits, rollout_logits, rows, mask, max, *others):  # type: ignore[no-untyped-def]
    return torch.empty_like(max)


def _token_objective(log_mu, *others, **settings):  # type: ignore[no-untyped-def]
    coefficient, weight, divergence = (torch.empty_like(log_mu) for _ in range(3))
    constants: dict[str, Any] = _C.metric_constants
    decades = constants["histogram_highest"] - constants["histogram_lowest"]
    bins = constants["histogram_bins_per_decade"] * decades + 2
    means = log_mu.new_empty(len(_C.mean_names), 2, dtype=torch.float64)
    maxima = log_mu.new_empty(len(_C.maximum_names), dtype=torch.float64)
    histogram, tokens = (log_mu.new_empty(shape, dtype=torch.int64) for shape in ((bins,), ()))
    return coefficient, weight, divergence, means, maxima, histogram, log_mu.new_empty(()), tokens


def _policy_gradient(logits, mask, target, log_mu, advantages, topk_ids, *others, **settings):  # type: ignore[no-untyped-def]
    n, topk = logits.shape[0], 0 if topk_ids is None else topk_ids.shape[1]
    shapes = ((n,), (n,), (n,), (n, topk))
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _check_tokens(target, *others, **tolerances):  # type: ignore[no-untyped-def]
    return target.new_empty(len(_C.check_names), 3, dtype=torch.float64)


def _nothing(*inputs):  # type: ignore[no-untyped-def]
    return None


_SHAPES: dict[str, Callable[..., Any]] = {
    "row_partials": _row_partials,
    "merge_partials": _merge_partials,
    "tile_nodes": _tile_nodes,
    "merge_tile_nodes": _merge_tile_nodes,
    "policy_backward": _nothing,
    "policy_backward_": _nothing,
    "shard_divergence": _shard_divergence,
    "token_objective": _token_objective,
    "policy_gradient_": _policy_gradient,
    "check_tokens": _check_tokens,
    "tile_hash": _nothing,
}


def register_shapes(namespace: str) -> None:
    """Tell torch.compile and torch.export what the operators of a namespace return."""
    for name, shapes in _SHAPES.items():
        torch.library.register_fake(f"{namespace}::{name}", shapes)


register_shapes(NAMESPACE)
torch.library.register_fake(f"{NAMESPACE}::fp32_product_", _nothing)
