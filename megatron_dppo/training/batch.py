"""Samples -> padded micro-batches.

A micro-batch holds B sequences of S tokens. Everything per token is aligned with the logits: position t predicts token
t + 1, so the sampled token, its rollout log-prob, its advantage and its mask stand at the position *before* the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_dppo.rollout.sample import Sample


@dataclass(frozen=True)
class TrainingExample:
    """One sequence to learn from: R response tokens after a prompt.

    Attributes:
        token_ids: prompt and response.
        prompt_length: tokens of the prompt; at least 1.
        advantage: of every response token.
        rollout_log_probs: [R] fp32 log-probs under the policy that the update is anchored on; None in supervised learning.
        topk_ids: [R, K] int64, topk_log_probs: [R, K] fp32, both from the rollout policy, or None.
        ref_log_probs: [R] fp32 log-probs under the reference policy, or None.
        trainable: False for a sample that must not contribute (the engine gave up on it).
    """

    token_ids: Sequence[int]
    prompt_length: int
    advantage: float = 0.0
    rollout_log_probs: torch.Tensor | None = None
    topk_ids: torch.Tensor | None = None
    topk_log_probs: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None
    trainable: bool = True

    @property
    def response_slice(self) -> slice:
        """The positions whose logits predict the response tokens."""
        return slice(self.prompt_length - 1, len(self.token_ids) - 1)


@dataclass(frozen=True)
class MicroBatch:
    """Padded tensors for one forward pass; the per-token ones have shape [B, S] (+[K])."""

    example_indices: tuple[int, ...]  # [B]: which of the given examples stands in each row
    tokens: torch.Tensor  # int64
    position_ids: torch.Tensor  # int64
    target: torch.Tensor  # int64: the next token; 0 where there is none
    loss_mask: torch.Tensor  # bool: the target is a response token
    advantages: torch.Tensor  # fp32
    rollout_log_probs: torch.Tensor | None = None  # fp32
    rollout_topk_ids: torch.Tensor | None = None  # int64
    rollout_topk_log_probs: torch.Tensor | None = None  # fp32
    rollout_logits: torch.Tensor | None = None  # [B, S, V/TP], exact divergences only
    ref_log_probs: torch.Tensor | None = None  # fp32

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def example_from_sample(sample: Sample, advantage: float) -> TrainingExample:
    """What a scored sample teaches."""
    return TrainingExample(
        token_ids=sample.token_ids,
        prompt_length=len(sample.prompt.token_ids),
        advantage=advantage,
        rollout_log_probs=torch.tensor(sample.rollout_log_probs, dtype=torch.float32),
        topk_ids=sample.topk_ids,
        topk_log_probs=sample.topk_log_probs,
        trainable=sample.finish_reason != "abort",
    )


def make_micro_batches(
    examples: Sequence[TrainingExample], micro_batch_size: int, length_multiple: int, equal_shapes: bool
) -> list[MicroBatch]:
    """Group examples of similar length and pad each group.

    Args:
        examples: this replica's share of one optimizer step.
        micro_batch_size: sequences per micro-batch; the last one may hold fewer.
        length_multiple: S is rounded up to it (sequence parallelism splits S evenly over the tensor-parallel ranks).
        equal_shapes: pad all micro-batches to one S, as a pipeline's fixed-shape transfers need.
    """
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].token_ids))
    groups = [tuple(by_length[i : i + micro_batch_size]) for i in range(0, len(by_length), micro_batch_size)]
    longest_of = [len(examples[(by_length if equal_shapes else group)[-1]].token_ids) for group in groups]
    return [
        _pad(group, [examples[index] for index in group], _round_up(longest, length_multiple))
        for group, longest in zip(groups, longest_of, strict=True)
    ]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _pad(indices: tuple[int, ...], group: Sequence[TrainingExample], length: int) -> MicroBatch:
    size = len(group)
    tokens = torch.zeros(size, length, dtype=torch.int64)
    target = torch.zeros(size, length, dtype=torch.int64)
    loss_mask = torch.zeros(size, length, dtype=torch.bool)
    advantages = torch.zeros(size, length)
    for row, example in enumerate(group):
        ids = torch.as_tensor(example.token_ids, dtype=torch.int64)
        tokens[row, : len(ids)] = ids
        target[row, : len(ids) - 1] = ids[1:]
        loss_mask[row, example.response_slice] = example.trainable
        advantages[row, example.response_slice] = example.advantage
    return MicroBatch(
        example_indices=indices,
        tokens=tokens,
        position_ids=torch.arange(length).expand(size, length).contiguous(),
        target=target,
        loss_mask=loss_mask,
        advantages=advantages,
        rollout_log_probs=_pad_per_token(group, [e.rollout_log_probs for e in group], length),
        rollout_topk_ids=_pad_per_token(group, [e.topk_ids for e in group], length),
        rollout_topk_log_probs=_pad_per_token(group, [e.topk_log_probs for e in group], length),
        ref_log_probs=_pad_per_token(group, [e.ref_log_probs for e in group], length),
    )


def _pad_per_token(
    group: Sequence[TrainingExample], values: Sequence[torch.Tensor | None], length: int
) -> torch.Tensor | None:
    """[R_i] or [R_i, K] per example -> [B, S] or [B, S, K], zero elsewhere; None if no example has it."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    if len(present) != len(values):
        raise ValueError("a per-token quantity must be given for all examples of a batch or for none")
    padded = present[0].new_zeros(len(group), length, *present[0].shape[1:])
    for row, (example, value) in enumerate(zip(group, present, strict=True)):
        padded[row, example.response_slice] = value
    return padded
