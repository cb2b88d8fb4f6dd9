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
from megatron_dppo.loss.inputs import FlatTokens, LossInputs, Sequences, masked

_NO_SEQUENCE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Aggregation:
    """How to sum N tokens: ``(token_weights * per_token).sum()`` over the global sum of ``num_tokens``.

    Attributes:
        token_weights: [N], or None: 1 for every token.
        num_tokens: scalar int64, on the device; None: the tokens of the mask, which whoever looks at all of them counts.
        local_lengths: [N] masked-in tokens of each token's sequence on this rank; None if they were not needed.
    """

    token_weights: torch.Tensor | None
    num_tokens: torch.Tensor | None
    local_lengths: torch.Tensor | None = None

    def sum(self, per_token: torch.Tensor) -> torch.Tensor:
        """Scalar, from [N] losses that are 0 outside the mask."""
        return per_token.sum() if self.token_weights is None else (self.token_weights * per_token).sum()

    def weighted(self, values: torch.Tensor, block: slice) -> torch.Tensor:
        """What ``sum`` adds up, for some of the tokens: [r] values of the block times its weights."""
        return values if self.token_weights is None else self.token_weights[block] * values


def aggregation_of(config: DPPOConfig, inputs: LossInputs, tokens: FlatTokens) -> Aggregation:
    """Weights of the tokens and the local denominator.

    A sequence whose tokens are spread over ranks (context parallelism) is counted once, by the rank that holds its
    first masked-in token: ``Sequences.lengths`` and ``starts`` say which that is. Without ``starts`` every sequence must be
    whole on this rank.

    Raises:
        LossInputError: ``sequences.ids`` are missing.
    """
    if config.aggregation == "token_mean":
        return Aggregation(None, None)
    sequences = inputs.sequences or Sequences()
    local_lengths, num_sequences = _count_sequences(inputs, sequences, tokens.mask)
    if sequences.starts is not None:
        num_sequences = masked(sequences.starts.reshape(-1).bool(), tokens.mask).sum()
    if config.aggregation == "seq_mean_token_sum_norm":
        assert config.horizon is not None
        return Aggregation(torch.full_like(tokens.advantages, 1.0 / config.horizon), num_sequences, local_lengths)
    lengths = local_lengths if sequences.lengths is None else sequences.lengths.reshape(-1)
    # Outside the mask a length may be 0 or anything; the loss is 0 there and must not meet a weight that is not finite.
    weights = 1.0 / lengths.clamp(min=1).to(tokens.advantages.dtype)
    return Aggregation(weights, num_sequences, local_lengths)


def _count_sequences(
    inputs: LossInputs, sequences: Sequences, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] length of each token's sequence on this rank, and the number of sequences with a masked-in token."""
    if sequences.ids is None:
        if inputs.target.dim() != 2:
            raise LossInputError(
                "packed tokens: a per-sequence aggregation needs sequences.ids [n], the sequence of each token"
            )
        mask_bs = inputs.target.new_ones(inputs.target.shape) if mask is None else mask.view(inputs.target.shape)
        lengths_b = mask_bs.sum(dim=1)
        return lengths_b[:, None].expand(inputs.target.shape).reshape(-1), (lengths_b > 0).sum()
    # torch.unique would wait for the device to tell how many there are; in sorted order equal ids stand together.
    ids = masked(sequences.ids.reshape(-1), mask, _NO_SEQUENCE)
    ordered = ids.sort().values
    lengths = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return lengths, (is_first & (ordered != _NO_SEQUENCE)).sum()
