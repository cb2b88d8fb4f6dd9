"""Per-token losses -> this rank's share of the numerator and denominator of the global loss.

Over all ranks and micro-batches, sum(loss) / sum(num_tokens) is the global loss, however the sequences were split:

    ========================  =====================  =============================
    aggregation               weight of a token      num_tokens
    ========================  =====================  =============================
    token_mean                1                      tokens in the mask
    seq_mean_token_mean       1 / its sequence's     non-empty sequences
                              length
    seq_mean_token_sum_norm   1 / horizon            non-empty sequences
    ========================  =====================  =============================

A sequence's length is its number of masked-in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dppo.errors import LossInputError
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.inputs import TokenBatch


@dataclass(frozen=True)
class Aggregation:
    """How to sum n tokens: ``(weights * per_token).sum()`` over the global sum of ``num_tokens`` (scalar int64)."""

    weights: torch.Tensor
    num_tokens: torch.Tensor


def aggregation_of(
    config: DPPOConfig,
    tokens: TokenBatch,
    sequence_ids: torch.Tensor | None,
    sequence_lengths: torch.Tensor | None,
    sequence_starts: torch.Tensor | None,
) -> Aggregation:
    """Weights of the tokens and the local denominator.

    Without ``sequence_ids``, each row of a [b, s] batch is one sequence.

    A sequence whose tokens are spread over ranks (context parallelism) is counted once, by the rank that holds its
    first masked-in token: give ``sequence_lengths`` (whole length, at each token) and ``sequence_starts`` (bool, True
    at that first token). Without ``sequence_starts`` every sequence must be whole on this rank; if ``sequence_lengths``
    says otherwise, that is an error rather than a wrong denominator.

    Raises:
        LossInputError: sequence_ids are missing or have the wrong shape, or the lengths contradict the mask.
    """
    ones = torch.ones_like(tokens.advantages)
    if config.aggregation == "token_mean":
        return Aggregation(ones, tokens.rows.new_tensor(tokens.rows.shape[0]))
    ids = _sequence_ids(tokens, sequence_ids)
    sequence, counts = torch.unique(ids, return_inverse=True, return_counts=True)[1:]
    local_lengths = counts[sequence]
    lengths = local_lengths if sequence_lengths is None else _select("sequence_lengths", tokens, sequence_lengths)
    _check_lengths(lengths, local_lengths, split_allowed=sequence_starts is not None)
    if sequence_starts is None:
        num_sequences = tokens.rows.new_tensor(counts.shape[0])
    else:
        num_sequences = _select("sequence_starts", tokens, sequence_starts).bool().sum()
    if config.horizon is not None and config.aggregation == "seq_mean_token_sum_norm":
        return Aggregation(ones / config.horizon, num_sequences)
    return Aggregation(1.0 / lengths.to(ones.dtype), num_sequences)


def _sequence_ids(tokens: TokenBatch, sequence_ids: torch.Tensor | None) -> torch.Tensor:
    if sequence_ids is not None:
        return _select("sequence_ids", tokens, sequence_ids)
    if tokens.mask.dim() != 2:
        raise LossInputError(
            "packed tokens: a per-sequence aggregation needs sequence_ids [n], the sequence of each token"
        )
    return tokens.rows // tokens.mask.shape[1]


def _select(name: str, tokens: TokenBatch, values: torch.Tensor) -> torch.Tensor:
    if values.shape != tokens.mask.shape:
        raise LossInputError(f"{name} has shape {tuple(values.shape)}, the loss mask {tuple(tokens.mask.shape)}")
    return tokens.select(values)


def _check_lengths(lengths: torch.Tensor, local_lengths: torch.Tensor, split_allowed: bool) -> None:
    if lengths is local_lengths:
        return
    if bool((lengths < local_lengths).any()):
        raise LossInputError("sequence_lengths is smaller than the number of a sequence's masked-in tokens")
    if not split_allowed and bool((lengths != local_lengths).any()):
        raise LossInputError(
            "sequence_lengths says that a sequence is spread over ranks: pass sequence_starts too (True at the first "
            "masked-in token of each sequence), so that exactly one rank counts it"
        )
