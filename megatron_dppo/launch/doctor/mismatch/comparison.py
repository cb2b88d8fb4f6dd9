"""Log-probs of two sides beside each other, and each side's body and head beside the definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from megatron_dppo.launch.doctor.mismatch.definition import Definition
from megatron_dppo.launch.doctor.mismatch.sides import Side, Tokens, defined_hidden, exact_log_probs

# Another right implementation's error is of the size of the rounded definition's (operators.py). Carried through all layers
# the two have less to do with each other, and the median over tokens is no mean over thousands of numbers.
_ROOM = 6.0
_UNIT_FP32 = 2.0**-24


@dataclass(frozen=True)
class Pair:
    """Two sides' log-probs of the same tokens.

    Attributes:
        first: side.
        second: side.
        mean: of abs(log ratio).
        largest: of abs(log ratio).
        kl: k3 estimate of KL(first || second): tokens are drawn by the first, or by somebody near to it.
    """

    first: str
    second: str
    mean: float
    largest: float
    kl: float


def pairs(sides: Sequence[Side]) -> list[Pair]:
    """Every two sides."""
    return [pair(a, b) for a, b in combinations(sides, 2)]


def pair(a: Side, b: Side) -> Pair:
    """Two of them."""
    log_ratio = b.log_probs - a.log_probs
    kl = (log_ratio.exp() - 1 - log_ratio).mean()
    return Pair(a.name, b.name, float(log_ratio.abs().mean()), float(log_ratio.abs().max()), float(kl))


@dataclass(frozen=True)
class BodyAndHead:
    """One side beside the definition in float64.

    Attributes:
        side: whose.
        body: median over tokens of the relative error of its last hidden state; None: it returns none.
        body_explained: how much of that rounding explains.
        head: mean abs difference between its log-probs and those that its own hidden states give exactly.
        head_explained: how much of that fp32 logits explain.
        head_of_16_bits: as ``head``, had it rounded logits to its dtype: what is to be expected if it does.
    """

    side: str
    body: float | None
    body_explained: float
    head: float | None
    head_explained: float
    head_of_16_bits: float | None

    @property
    def body_differs(self) -> bool:
        """Whether it computes other hidden states than the definition."""
        return self.body is not None and not self.body <= self.body_explained

    @property
    def head_differs(self) -> bool:
        """Whether its log-probs are not those of its hidden states."""
        return self.head is not None and not self.head <= self.head_explained

    @property
    def head_is_rounded(self) -> bool:
        """Whether rounding of logits to 16 bits, and nothing else, explains how its head differs."""
        return self.head_differs and self.head_of_16_bits is not None and self.head <= 2 * self.head_of_16_bits  # type: ignore[operator]


class Yardstick:
    """The definition of a folder's model for some tokens, in float64 and rounded."""

    def __init__(self, exact: Definition, rounded: Definition, sequences: Sequence[Tokens]) -> None:
        self._exact, self._dtype, self._sequences = exact, rounded.dtype, sequences
        self._hidden = defined_hidden(exact, sequences).double()
        self._explained = _ROOM * self._error(defined_hidden(rounded, sequences)) + torch.finfo(rounded.dtype).eps / 2

    def measure(self, side: Side) -> BodyAndHead:
        """How far a side is off."""
        if side.hidden is None:
            return BodyAndHead(side.name, None, self._explained, None, 0.0, None)
        logits = self._exact.logits(side.hidden)
        right = exact_log_probs(self._exact, side.hidden, self._sequences)
        # A logit is a sum of h products, each rounded, and so is the sum of exponentials: at worst sqrt(h) and some more
        # units of the largest logit's size.
        size = float(logits.abs().amax())
        explained = 2 * _UNIT_FP32 * size * (side.hidden.shape[1] ** 0.5 + 4)
        rounded = None
        if self._dtype != torch.float32:
            targets = torch.cat([tokens.targets for tokens in self._sequences]).to(logits.device)
            coarse = logits.to(self._dtype).double().log_softmax(-1).gather(-1, targets[:, None])[:, 0].cpu()
            rounded = float((coarse - right).abs().mean())
        head = float((side.log_probs - right).abs().mean())
        return BodyAndHead(side.name, self._error(side.hidden), self._explained, head, explained, rounded)

    def _error(self, hidden: torch.Tensor) -> float:
        apart = (hidden.double() - self._hidden).norm(dim=-1) / self._hidden.norm(dim=-1)
        return float(apart.median())
