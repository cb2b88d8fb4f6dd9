"""Impossible values in the loss's inputs: found on the device, reported when somebody looks.

Every check is a predicate over the tokens. What it finds is one small record, [checks, 3]: the first bad token's position, or
-1, its value, and its target. Reading the record waits for the device; making it does not, so that a training loop can queue
a whole optimizer step and look once, before it applies the step. Plain torch here is the definition; compiled backends have
what is asked of every token as one operator (csrc/core/token_checks.h).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from megatron_dppo.errors import LossInputError
from megatron_dppo.loss.inputs import FlatTokens, LossInputs, Sequences
from megatron_dppo.ops.backend import Backend

CHECKS = ("now", "deferred", "off")

# Rounding in a serving engine's softmax; more than this is another distribution.
TOPK_MASS_TOLERANCE = 1e-3
# Rounding can put a log-prob slightly above 0; more than this is not rounding.
LOG_PROB_TOLERANCE = 1e-3


@dataclass(frozen=True)
class InputChecks:
    """What was found wrong with the inputs of one call, still on the device.

    Attributes:
        messages: what each check asks for.
        record: [checks, 3] fp64: position of the first bad token in the flattened tokens (-1: none), its value, its target
            (NaN: not known).
        shape: [...] of the tokens.
    """

    messages: tuple[str, ...]
    record: torch.Tensor
    shape: torch.Size

    @classmethod
    def joined(cls, parts: Iterable[InputChecks]) -> InputChecks:
        """All checks of the same tokens, in order."""
        first, *others = parts
        if not others:
            return first
        messages = first.messages + tuple(message for part in others for message in part.messages)
        return cls(messages, torch.cat([first.record, *(part.record for part in others)]), first.shape)

    def failed(self) -> torch.Tensor:
        """Scalar bool on the device: whether anything is wrong."""
        return (self.record[:, 0] >= 0).any()

    def raise_errors(self, describe: Callable[[int], str] | None = None) -> None:
        """Raise LossInputError for the first check that failed. **Waits for the device.**

        Args:
            describe: flat position -> what the caller calls that token; by default its place in the tokens' shape.
        """
        for message, (position, value, target) in zip(self.messages, self.record.tolist(), strict=True):
            if position >= 0:
                place = (describe or self._place)(int(position))
                token = "" if math.isnan(target) else f" (token id {int(target)})"
                raise LossInputError(f"{message}: {value:g} at {place}{token}")

    def _place(self, position: int) -> str:
        place = [int(i) for i in torch.unravel_index(torch.tensor(position), self.shape)]
        if len(place) == 2:
            return f"batch index {place[0]}, position {place[1]}"
        return f"token {', '.join(map(str, place))}"


class _Checker:
    """Collects (message, [N] value, [N] bad) and makes the record of them."""

    def __init__(self, mask: torch.Tensor | None) -> None:
        self.mask = mask
        self.messages: list[str] = []
        self.values: list[torch.Tensor] = []
        self.bad: list[torch.Tensor] = []

    def require(self, message: str, values: torch.Tensor, fine: torch.Tensor, everywhere: bool = False) -> None:
        """``fine`` is [N], or [N, K] with ``values``; outside the mask it does not matter, unless ``everywhere``."""
        bad = ~fine
        if values.dim() == 2:
            if values.shape[1] == 0:
                return
            values = values.gather(1, bad.int().argmax(dim=1, keepdim=True))[:, 0]
            bad = bad.any(dim=1)
        self.messages.append(message)
        self.values.append(values.double())
        self.bad.append(bad if everywhere or self.mask is None else bad & self.mask)

    def found(self, target: torch.Tensor, shape: torch.Size) -> list[InputChecks]:
        """What the checks asked for have found; empty if there were none."""
        if not self.messages:
            return []
        return [InputChecks(tuple(self.messages), self._record(target), shape)]

    def _record(self, target: torch.Tensor) -> torch.Tensor:
        if target.shape[0] == 0:
            return torch.full((len(self.messages), 3), -1.0, dtype=torch.float64, device=target.device)
        bad_CN, values_CN = torch.stack(self.bad), torch.stack(self.values)
        first_C = bad_CN.int().argmax(dim=1)
        at_C1 = first_C[:, None]
        positions = torch.where(bad_CN.any(dim=1), first_C, -1)
        return torch.stack(
            [positions.double(), values_CN.gather(1, at_C1)[:, 0], target.index_select(0, first_C).double()], dim=1
        )


def check_values(
    inputs: LossInputs,
    tokens: FlatTokens,
    vocab_size: int,
    sequence_lengths: torch.Tensor | None,
    backend: Backend,
) -> InputChecks:
    """Look for impossible values of masked-in tokens, without waiting for the answer.

    Args:
        inputs: as given.
        tokens: the same, flat: says which fields are read.
        vocab_size: true size of the vocabulary.
        sequence_lengths: [N] masked-in tokens of each token's sequence on this rank, if the aggregation counted them.
        backend: whose operator to use, if it has one.
    """
    shape = inputs.target.shape
    of_mask, of_sequences = _Checker(tokens.mask), _Checker(tokens.mask)
    _require_mask(of_mask, inputs.loss_mask)
    if sequence_lengths is not None and inputs.sequences is not None and inputs.sequences.lengths is not None:
        _require_lengths(of_sequences, inputs.sequences, sequence_lengths)
    of_tokens = _checked_by_torch if backend.operators is None else _checked_by_an_operator
    return InputChecks.joined(
        [
            *of_mask.found(tokens.target, shape),
            *of_tokens(tokens, vocab_size, shape, backend),
            *of_sequences.found(tokens.target, shape),
        ]
    )


def _messages(vocab_size: int) -> dict[str, str]:
    """What is asked of every token, by the operator's names for the checks."""
    return {
        "target": f"target must lie in [0, {vocab_size})",
        "advantages": "advantages must be finite",
        "log_mu": "rollout_log_probs must be finite and, but for rounding, not above 0",
        "topk_ids": f"rollout_topk.ids must lie in [0, {vocab_size})",
        "topk_log_mu": "rollout_topk.log_probs must not be NaN nor, but for rounding, above 0",
        "topk_mass": "the rollout top-K probabilities must not sum to more than 1",
        "ref_log_prob": "ref_log_probs must be finite",
    }


def _checked_by_torch(tokens: FlatTokens, vocab_size: int, shape: torch.Size, backend: Backend) -> list[InputChecks]:
    """The definition."""
    checker, messages = _Checker(tokens.mask), _messages(vocab_size)

    def in_vocabulary(ids: torch.Tensor) -> torch.Tensor:
        return (ids >= 0) & (ids < vocab_size)

    checker.require(messages["target"], tokens.target, in_vocabulary(tokens.target))
    _require_advantages_and_anchor(checker, tokens.advantages, tokens.rollout_log_probs)
    ids, log_probs, ref_log_probs = tokens.topk_ids, tokens.topk_log_probs, tokens.ref_log_probs
    if ids is not None and log_probs is not None:
        checker.require(messages["topk_ids"], ids, in_vocabulary(ids))
        checker.require(messages["topk_log_mu"], log_probs, log_probs <= LOG_PROB_TOLERANCE)
        mass = log_probs.double().exp().sum(dim=1)
        checker.require(messages["topk_mass"], mass, mass <= 1.0 + TOPK_MASS_TOLERANCE)
    if ref_log_probs is not None:
        checker.require(messages["ref_log_prob"], ref_log_probs, ref_log_probs.isfinite())
    return checker.found(tokens.target, shape)


def _checked_by_an_operator(
    tokens: FlatTokens, vocab_size: int, shape: torch.Size, backend: Backend
) -> list[InputChecks]:
    """The same in one launch."""
    assert backend.operators is not None
    record = backend.operators.check_tokens(
        tokens.target,
        tokens.advantages,
        tokens.rollout_log_probs,
        tokens.mask,
        tokens.topk_ids,
        tokens.topk_log_probs,
        tokens.ref_log_probs,
        vocab_size,
        log_prob_tolerance=LOG_PROB_TOLERANCE,
        mass_tolerance=TOPK_MASS_TOLERANCE,
    )
    return [InputChecks(tuple(_messages(vocab_size)[name] for name in _operator_checks()), record, shape)]


def _operator_checks() -> tuple[str, ...]:
    """Names of the operator's checks, in the order of its record."""
    import megatron_dppo._C as _C  # only where the kernels are in use

    return _C.check_names


def check_sampled_values(
    log_probs: torch.Tensor, advantages: torch.Tensor, rollout_log_probs: torch.Tensor, loss_mask: torch.Tensor | None
) -> InputChecks:
    """The same where only the sampled tokens' log-probs are known, and not which tokens they are."""
    checker = _Checker(None if loss_mask is None else loss_mask.reshape(-1).bool())
    _require_mask(checker, loss_mask)
    _require_advantages_and_anchor(checker, advantages, rollout_log_probs)
    log_pi = log_probs.reshape(-1)
    checker.require("log_probs must not be NaN nor, but for rounding, above 0", log_pi, log_pi <= LOG_PROB_TOLERANCE)
    unknown = torch.full((log_probs.numel(),), torch.nan, device=log_probs.device)
    return InputChecks.joined(checker.found(unknown, log_probs.shape))


def _require_mask(checker: _Checker, loss_mask: torch.Tensor | None) -> None:
    if loss_mask is not None and loss_mask.dtype != torch.bool:
        loss_mask = loss_mask.reshape(-1)
        checker.require("loss_mask must be 0 or 1", loss_mask, (loss_mask == 0) | (loss_mask == 1), everywhere=True)


def _require_lengths(checker: _Checker, sequences: Sequences, local_lengths: torch.Tensor) -> None:
    assert sequences.lengths is not None
    lengths = sequences.lengths.reshape(-1)
    checker.require(
        "sequences.lengths is smaller than the number of the sequence's masked-in tokens",
        lengths,
        lengths >= local_lengths,
    )
    if sequences.starts is None:
        checker.require(
            "sequences.lengths says that a sequence is spread over ranks: give sequences.starts too (True at the first "
            "masked-in token of each sequence), so that exactly one rank counts it",
            lengths,
            lengths <= local_lengths,
        )


def _require_advantages_and_anchor(
    checker: _Checker, advantages: torch.Tensor, rollout_log_probs: torch.Tensor
) -> None:
    messages = _messages(vocab_size=0)  # these two do not speak of it
    advantages, log_mu = advantages.reshape(-1), rollout_log_probs.reshape(-1)
    checker.require(messages["advantages"], advantages, advantages.isfinite())
    checker.require(messages["log_mu"], log_mu, log_mu.isfinite() & (log_mu <= LOG_PROB_TOLERANCE))
