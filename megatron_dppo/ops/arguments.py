"""What the operators work on, in the terms that all backends share (csrc/core/arguments.h has the same structures).

Nothing here looks at the values of a tensor: that would wait for the device. ``check_ids`` is the one exception, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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

    @classmethod
    def locate(cls, width: int, vocab_size: int | None, tp_group: dist.ProcessGroup | None) -> VocabShard:
        """Shard r of the group owns the global columns [r width, (r + 1) width); those from ``vocab_size`` on are padding.

        Raises:
            ValueError: the shards hold fewer columns than the vocabulary has tokens.
        """
        rank, world_size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
        if vocab_size is None:
            vocab_size = width * world_size
        if not 0 < vocab_size <= width * world_size:
            raise ValueError(
                f"vocab_size is {vocab_size}, but {world_size} shard(s) of {width} columns hold {width * world_size}. "
                "Pass the true vocabulary size and, if the logits are sharded, tp_group"
            )
        first_column = rank * width
        return cls(tp_group, vocab_size, first_column, max(0, min(width, vocab_size - first_column)))

    def part(self, columns: slice) -> VocabShard:
        """A run of this shard's columns as a shard of its own."""
        true_columns = min(columns.stop, self.num_columns) - columns.start
        return VocabShard(self.group, self.vocab_size, self.first_column + columns.start, max(0, true_columns))


class RowSelection(NamedTuple):
    """Which of N rows of logits matter: at most one of the two is given, and with neither all of them do.

    Attributes:
        rows: [n] int64, distinct. Whatever belongs to a row (ids, results) is then compact, [n].
        mask: [N] bool. Whatever belongs to a row is [N]; rows outside are not read, and their results are 0.
    """

    rows: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def take(self, values_N: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [n, ...] with ``rows``, else as it is."""
        return values_N if self.rows is None else values_N.index_select(0, self.rows)

    def spread(self, values_n: torch.Tensor, num_rows: int) -> torch.Tensor:
        """[n, ...] -> [N, ...] with 0 in the other rows; without ``rows`` as it is."""
        if self.rows is None:
            return values_n
        return values_n.new_zeros(num_rows, *values_n.shape[1:]).index_copy_(0, self.rows, values_n)

    def as_mask(self, num_rows: int) -> torch.Tensor | None:
        """[N] bool; None where every row matters."""
        if self.rows is None:
            return self.mask
        return torch.zeros(num_rows, dtype=torch.bool, device=self.rows.device).index_fill_(0, self.rows, True)


class TokenIds(NamedTuple):
    """Global token ids of the selected rows.

    Attributes:
        target: [n] int64.
        topk: [n, K] int64, or None.
    """

    target: torch.Tensor
    topk: torch.Tensor | None


class Normaliser(NamedTuple):
    """What turns a row's scaled logits z into log-probs: ``(z - max) - log_sum``.

    Attributes:
        max: [n] the largest scaled logit.
        log_sum: [n] log sum exp(z - max). Kept apart from ``max``: ``z - (max + log_sum)`` would lose digits, 1e-3 at
            |z| = 1e4.
    """

    max: torch.Tensor
    log_sum: torch.Tensor


class RowState(NamedTuple):
    """What a backward needs to know of every row.

    Attributes:
        log_prob: [N] of the target.
        entropy: [N].
        max: [N] and
        log_sum: [N], the row's normaliser.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    max: torch.Tensor
    log_sum: torch.Tensor


class KnownColumns(NamedTuple):
    """Tokens whose rollout probability the serving engine reported; all other columns are rescaled.

    Attributes:
        ids: [n, S] int64 global ids, distinct; -1 in slots that do not count.
        log_prob: [n, S] their log-probs.
        log_rescale: [n] added to the recomputed log-probs of all other tokens.
    """

    ids: torch.Tensor
    log_prob: torch.Tensor
    log_rescale: torch.Tensor


def as_matrix(logits: torch.Tensor) -> torch.Tensor:
    """[..., V/TP] -> [N, V/TP] with adjacent columns; a view wherever the strides allow it, else a copy."""
    logits_NV = logits.reshape(-1, logits.shape[-1])
    return logits_NV if logits_NV.stride(-1) == 1 else logits_NV.contiguous()


def check_rows_apart(logits_NV: torch.Tensor) -> None:
    """Raise ValueError if rows share memory, as those of an expanded tensor do: each has a gradient of its own."""
    if logits_NV.shape[0] > 1 and logits_NV.stride(0) < logits_NV.shape[1]:
        raise ValueError(
            f"inplace_backward=True, but rows of the logits share memory (strides {logits_NV.stride()} as a matrix), where "
            "no gradient can be written: pass logits.contiguous(), or inplace_backward=False"
        )


def select(
    of: str,
    features: torch.Tensor,
    tokens: torch.Size,
    target: torch.Tensor,
    topk_ids: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> tuple[RowSelection, TokenIds, torch.Size]:
    """Check shapes, dtypes and devices, and flatten what belongs to a token.

    Args:
        of: what ``features`` is called in messages.
        features: the logits or hidden states.
        tokens: [...] shape of the tokens that they stand for.
        target: [...] int64; [n] with ``rows``.
        topk_ids: [..., K] int64; [n, K] with ``rows``.
        token_mask: [...] bool.
        rows: [n] int64, flat positions.

    Returns:
        the selection, the ids, and the shape of the results: [...], or [n] with ``rows``.
    """
    if features.dtype not in FLOATING:
        raise ValueError(f"{of} must be bf16, fp16, fp32 or fp64, not {features.dtype}")
    if rows is not None and token_mask is not None:
        raise ValueError("give rows or token_mask, not both: each of them says which tokens matter")
    if rows is not None and rows.dim() != 1:
        raise ValueError(f"rows must be [n] flat positions, not {tuple(rows.shape)}")
    expected = tokens if rows is None else rows.shape
    for name, tensor, shape, dtype in (
        ("rows", rows, expected, torch.int64),
        ("target", target, expected, torch.int64),
        ("topk_ids", topk_ids, expected, torch.int64),
        ("token_mask", token_mask, tokens, torch.bool),
    ):
        if tensor is None:
            continue
        found = tensor.shape[:-1] if name == "topk_ids" else tensor.shape
        if found != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; {of} {tuple(features.shape)} ask for {tuple(shape)}"
                + (" (with rows)" if rows is not None else "")
            )
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
        if tensor.device != features.device:
            raise ValueError(f"{name} is on {tensor.device}, {of} on {features.device}")
    topk = None if topk_ids is None else topk_ids.reshape(target.numel(), topk_ids.shape[-1])
    mask = None if token_mask is None else token_mask.reshape(-1)
    return RowSelection(rows, mask), TokenIds(target.reshape(-1), topk), expected


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless it can divide logits."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, not {temperature}")


def check_ids(ids: TokenIds, selection: RowSelection, shape: torch.Size, vocab_size: int) -> None:
    """Raise ValueError for the first id outside the vocabulary. **Waits for the device.**"""
    for name, ids_nK in (("target", ids.target[:, None]), ("topk_ids", ids.topk)):
        if ids_nK is None:
            continue
        bad_n = ((ids_nK < 0) | (ids_nK >= vocab_size)).any(dim=1)
        if selection.mask is not None:
            bad_n &= selection.mask
        if not bool(bad_n.any()):
            continue
        first = int(bad_n.nonzero()[0, 0])
        position = [int(i) for i in torch.unravel_index(torch.tensor(first), shape)]
        raise ValueError(f"{name} at {position} is {ids_nK[first].tolist()}: ids must lie in [0, {vocab_size})")
