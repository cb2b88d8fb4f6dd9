"""What an update did to single tokens: sums over all of them by place and by probability, and every token of a few responses.

Each micro-batch leaves a ``TokenRecord`` on the device, where nothing waits for it. Once the step is done, ``gathered`` makes
one ``StepTokens`` of the records of all ranks. What comes of it is in the run folder: distributions.jsonl has the sums,
samples.jsonl the single tokens (sample_log.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_dppo.distributed.collectives import gather_bytes
from megatron_dppo.loss.dppo_loss import LossOutput
from megatron_dppo.training.data.micro_batch import MicroBatch

# Lowest place in the response, from 0, of each bin: each is as wide as all before it. The last one has no end.
POSITION_BINS = (0, *(2**power for power in range(20)))
# Lowest probability under the rollout policy of each bin; the last one ends at 1.
PROBABILITY_BINS = (0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
# What is summed in each bin; of tokens with A != 0, as in dppo/*.
SUMMED = ("tokens", "masked", "divergence", "abs_log_ratio")
# What is kept of single tokens.
TRACED = ("weight", "divergence", "log_prob", "rollout_log_prob")


@dataclass(frozen=True)
class TokenRecord:
    """Of one micro-batch and rank; on the device.

    Attributes:
        by_position: [len(POSITION_BINS), len(SUMMED)] fp64.
        by_probability: [len(PROBABILITY_BINS), len(SUMMED)] fp64.
        traced: numbers of examples of this micro-batch whose single tokens are wanted.
        numbers, positions: [n] int64, of which example each token is and where in its response; None if none is traced.
        values: [len(TRACED), n] fp32; None likewise.
    """

    by_position: torch.Tensor
    by_probability: torch.Tensor
    traced: tuple[int, ...]
    numbers: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: MicroBatch, output: LossOutput, traced: Collection[int]) -> TokenRecord:
        """``batch`` on the device, as it went into the loss. Waits for nothing."""
        assert batch.inputs is not None
        assert batch.inputs.sequences is not None
        log_mu = batch.inputs.rollout_log_probs
        moved = (batch.inputs.advantages != 0).double()
        masked = moved * (output.weight == 0)
        log_ratio = (output.log_prob - log_mu).abs()
        summed = torch.stack([moved, masked, moved * output.divergence, moved * log_ratio], dim=1)
        here = tuple(number for number in batch.example_indices if number in traced)
        by_position = _in_bins(batch.response_positions.float(), POSITION_BINS, summed)
        by_probability = _in_bins(log_mu.float().exp(), PROBABILITY_BINS, summed)
        if not here:
            return cls(by_position, by_probability, here)
        values = torch.stack([v.float() for v in (output.weight, output.divergence, output.log_prob, log_mu)])
        return cls(by_position, by_probability, here, batch.inputs.sequences.ids, batch.response_positions, values)


@dataclass
class StepTokens:
    """Of all micro-batches and ranks of a step.

    Attributes:
        by_position: SUMMED of each bin of POSITION_BINS.
        by_probability: SUMMED of each bin of PROBABILITY_BINS.
        traces: number of an example -> {place in the response: TRACED of that token}.
    """

    by_position: list[list[float]] = field(default_factory=lambda: _zeros(POSITION_BINS))
    by_probability: list[list[float]] = field(default_factory=lambda: _zeros(PROBABILITY_BINS))
    traces: dict[int, dict[int, list[float]]] = field(default_factory=dict)

    def add(self, other: dict[str, Any]) -> None:
        """Take in what another rank has."""
        self.by_position = _sum(self.by_position, other["by_position"])
        self.by_probability = _sum(self.by_probability, other["by_probability"])
        for number, place, *values in other["tokens"]:
            self.traces.setdefault(number, {})[place] = values


def gathered(records: Sequence[TokenRecord], most_tokens: int) -> StepTokens:
    """Of the records of all ranks, on every rank. Collective over all ranks, most of which have none.

    Args:
        records: of this rank's micro-batches, of steps that were applied.
        most_tokens: of each traced response, as many from its start.
    """
    own: dict[str, Any] = {}
    if records and parallel_state.get_tensor_model_parallel_rank() == 0:  # the others have the same
        own = {
            "by_position": torch.stack([record.by_position for record in records]).sum(0).tolist(),
            "by_probability": torch.stack([record.by_probability for record in records]).sum(0).tolist(),
            "tokens": [token for record in records for token in _traced_tokens(record, most_tokens)],
        }
    total = StepTokens()
    for data in gather_bytes(json.dumps(own).encode() if own else b""):
        if data:
            total.add(json.loads(data))
    return total


def _traced_tokens(record: TokenRecord, most_tokens: int) -> Iterable[list[float]]:
    """[number, place, *TRACED] of each token that is wanted."""
    if record.numbers is None or record.positions is None or record.values is None:
        return []
    numbers, positions, values = record.numbers.tolist(), record.positions.tolist(), record.values.T.tolist()
    return [
        [number, place, *(_rounded(value) for value in of_token)]
        for number, place, of_token in zip(numbers, positions, values, strict=True)
        if number in record.traced and place < most_tokens
    ]


def _in_bins(values: torch.Tensor, lowest: Sequence[float], summed: torch.Tensor) -> torch.Tensor:
    """[bins, S]: the rows of ``summed`` [n, S] added up in the bin of each of ``values`` [n]."""
    edges = torch.tensor(lowest[1:], dtype=torch.float32).to(values.device, non_blocking=True)
    total = summed.new_zeros(len(lowest), summed.shape[1])
    return total.index_add_(0, torch.bucketize(values, edges, right=True), summed)


def _rounded(value: float) -> float:
    """4 significant digits: what a colour and a tooltip can show."""
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0


def _zeros(bins: Sequence[float]) -> list[list[float]]:
    return [[0.0] * len(SUMMED) for _ in bins]


def _sum(left: list[list[float]], right: list[list[float]]) -> list[list[float]]:
    return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]
