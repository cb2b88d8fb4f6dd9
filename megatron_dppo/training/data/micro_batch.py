"""Training examples, and the tensors of a micro-batch made of some of them.

A micro-batch holds B rows of S tokens: one sequence to a row (padded), or all sequences in one row (packed). Everything per
token is aligned with the logits: position t predicts token t + 1, so the sampled token, its rollout log-prob, its advantage
and its mask stand at the position *before* the token. With context parallelism each rank holds its part of every sequence
(see token_layout.py), cut after this alignment, so a target may be a token that stands on another rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from megatron_dppo.loss.inputs import LossInputs, Sequences, TopK, map_tensors
from megatron_dppo.models.packed_sequences import PackedSequences, packed_sequences
from megatron_dppo.rollout.sample import Sample
from megatron_dppo.training.data.schedule import PADDING_LENGTH
from megatron_dppo.training.data.token_layout import TokenLayout


@dataclass(frozen=True)
class TrainingExample:
    """One sequence to learn from: R response tokens after a prompt.

    Attributes:
        token_ids: [prompt + R] integers, prompt and response.
        prompt_length: tokens of the prompt; at least 1.
        advantage: of every response token.
        rollout_log_probs: [R] fp32 log-probs under the policy that the update is anchored on; None in supervised learning.
        topk_ids: [R, K] integers, topk_log_probs: [R, K] fp32, both from the rollout policy, or None.
        ref_log_probs: [R] fp32 log-probs under the reference policy, or None.
        routed_experts: [prompt + R - 1, layers, experts per token] integers, where the engine routed each token, or None.
            The layers are those of the whole policy where it was sampled, and this rank's where it is learned from.
        trainable: False for a sample that must not contribute (the engine gave up on it).
    """

    token_ids: torch.Tensor
    prompt_length: int
    advantage: float = 0.0
    rollout_log_probs: torch.Tensor | None = None
    topk_ids: torch.Tensor | None = None
    topk_log_probs: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None
    routed_experts: torch.Tensor | None = None
    trainable: bool = True

    @property
    def response_slice(self) -> slice:
        """The positions whose logits predict the response tokens."""
        return slice(self.prompt_length - 1, len(self.token_ids) - 1)


@dataclass(frozen=True)
class ExampleFields:
    """What the examples of a step have beside tokens: all of them, or none.

    Attributes:
        rollout_log_probs: whether they have any.
        topk: K of the rollout policy's top-K log-probs; 0: none.
        ref_log_probs: whether they have any.
        routed_experts: (layers, experts per token); None: none.
        expert_dtype: of the expert choices: one byte, or two for a policy of more than 256 experts.
    """

    rollout_log_probs: bool = False
    topk: int = 0
    ref_log_probs: bool = False
    routed_experts: tuple[int, int] | None = None
    expert_dtype: torch.dtype = torch.int16

    def padding_example(self) -> TrainingExample:
        """An example that only fills a slot: one token after a prompt of one, which counts for nothing."""
        return TrainingExample(
            token_ids=torch.zeros(PADDING_LENGTH, dtype=torch.int32),
            prompt_length=1,
            rollout_log_probs=torch.zeros(1) if self.rollout_log_probs else None,
            topk_ids=torch.zeros(1, self.topk, dtype=torch.int32) if self.topk else None,
            topk_log_probs=torch.zeros(1, self.topk) if self.topk else None,
            ref_log_probs=torch.zeros(1) if self.ref_log_probs else None,
            routed_experts=None
            if self.routed_experts is None
            else torch.zeros(1, *self.routed_experts, dtype=self.expert_dtype),
            trainable=False,
        )


def example_from_sample(sample: Sample, advantage: float) -> TrainingExample:
    """What a scored sample teaches."""
    return TrainingExample(
        token_ids=torch.tensor(sample.token_ids, dtype=torch.int32),
        prompt_length=len(sample.prompt.token_ids),
        advantage=advantage,
        rollout_log_probs=torch.tensor(sample.rollout_log_probs, dtype=torch.float32),
        topk_ids=sample.topk_ids,
        topk_log_probs=sample.topk_log_probs,
        routed_experts=sample.routed_experts,
        trainable=sample.finish_reason != "abort",
    )


@dataclass(frozen=True)
class MicroBatch:
    """What this context-parallel rank computes in one forward pass.

    The model sees B rows of S tokens, B = 1 if packed. The loss sees the n response tokens among them, whose places are
    known here, on the host: ``rows``. Nothing after this asks a device how many there are.

    Attributes:
        example_indices: number of the example that each sequence is; PADDING for one that only fills a slot.
        layout: where the sequences stand before the cut over context-parallel ranks.
        positions: [S] int64, where this rank's tokens stand in ``layout``; None without context parallelism.
        tokens, position_ids: [B, S] int64.
        num_padding: how many of the B S tokens belong to no sequence.
        rows: [n] int64, where in the flattened [B, S] the response tokens to learn from are predicted, in order.
        target: [n] int64, those tokens.
        response_positions: [n] int64, where in its response each of them stands, from 0.
        inputs: [n] everything that the loss needs to know of them; None in supervised learning.
        routed_experts: [B, S, layers of this rank, experts per token] integers, 0 where the engine has not routed; or None.
        packed_seq_params: where the whole, uncut sequences begin; None if padded.
    """

    example_indices: tuple[int, ...]
    layout: TokenLayout
    positions: torch.Tensor | None
    tokens: torch.Tensor
    position_ids: torch.Tensor
    num_padding: int
    rows: torch.Tensor
    target: torch.Tensor
    response_positions: torch.Tensor
    inputs: LossInputs | None
    routed_experts: torch.Tensor | None
    packed_seq_params: PackedSequences | None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S) of this rank."""
        return self.tokens.shape[0], self.tokens.shape[1]

    def to(self, device: torch.device, *, core_reads_bounds_on_device: bool) -> MicroBatch:
        """The same micro-batch on another device. Every tensor is copied once, under however many names it is held: it takes
        one copy, and Transformer Engine asks whether two tensors are the same object (models/packed_sequences.py).

        Args:
            device: where the model is.
            core_reads_bounds_on_device: whether the model applies its rotary embedding in a fused kernel, which reads the
                bounds of packed sequences there; without one, core would wait for the device to read them.
        """
        copies: dict[int, torch.Tensor] = {}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.to(device, non_blocking=True)
            return copies[id(tensor)]

        moved: dict[str, Any] = {n: move(value) for n, value in vars(self).items() if isinstance(value, torch.Tensor)}
        if self.inputs is not None:
            moved["inputs"] = map_tensors(self.inputs, move)
        if self.packed_seq_params is not None:
            moved["packed_seq_params"] = self.packed_seq_params.moved(move, core_reads_bounds_on_device)
        return replace(self, **moved)

    def in_layout(self, values_n: torch.Tensor) -> torch.Tensor:
        """[n] values of the response tokens -> [rows, length] of ``layout``, 0 elsewhere.

        Summed over the context-parallel ranks, these are the values of the whole micro-batch.
        """
        local = values_n.new_zeros(self.tokens.numel()).index_copy_(0, self.rows, values_n).view(self.shape)
        if self.positions is None:
            return local
        whole = values_n.new_zeros(self.layout.rows, self.layout.length)
        return whole.index_copy_(1, self.positions, local)

    def describe(self, token: int) -> str:
        """What a person calls the ``token``-th response token of this rank. Waits for the device."""
        row, position = divmod(int(self.rows[token]), self.shape[1])
        if self.inputs is not None and self.inputs.sequences is not None and self.inputs.sequences.ids is not None:
            return f"example {int(self.inputs.sequences.ids[token])} of this step (row {row}, position {position})"
        return f"row {row}, position {position}"


def make_micro_batch(
    examples: Sequence[TrainingExample],
    indices: Sequence[int],
    layout: TokenLayout,
    context_parallel_size: int = 1,
    context_parallel_rank: int = 0,
    log_prob_floor: float = -math.inf,
) -> MicroBatch:
    """Lay out ``examples`` and keep this context-parallel rank's part.

    Args:
        examples: one for every place of the layout. All or none have log-probs, top-K values, routed experts.
        indices: their numbers; PADDING for one that only fills a slot.
        layout: see token_layout.py.
        context_parallel_size: ranks that share every sequence; the layout's parts are multiples of twice that.
        context_parallel_rank: this one of them.
        log_prob_floor: a rollout log-prob below is a fault of the engine: nothing is learned from its token.
    """
    is_split = context_parallel_size > 1
    positions = layout.positions_on_rank(context_parallel_size, context_parallel_rank) if is_split else None

    def on_this_rank(values: torch.Tensor | None) -> torch.Tensor | None:
        """[rows, length, ...] of the layout -> [B, S, ...]."""
        return values if values is None or positions is None else values.index_select(1, positions)

    sequences = _Spans(layout, [0] * len(examples), [len(e.token_ids) for e in examples])
    predicting = _Spans(layout, [0] * len(examples), [len(e.token_ids) - 1 for e in examples])
    part_positions = torch.cat([torch.arange(end - start) for start, end in pairwise(layout.bounds)])
    whole = {
        "tokens": sequences.write(torch.cat([e.token_ids for e in examples]).long()),
        "position_ids": part_positions.expand(layout.rows, -1).contiguous(),
        "routed_experts": predicting.write_given([e.routed_experts for e in examples]),
    }
    is_token = on_this_rank(sequences.write(torch.ones(int(sequences.lengths.sum()), dtype=torch.bool)))
    learned_in_layout, per_token = _response_fields(examples, indices, layout, is_split, log_prob_floor)
    is_learned = on_this_rank(learned_in_layout)
    assert is_token is not None
    assert is_learned is not None
    rows = is_learned.flatten().nonzero()[:, 0]

    def of_learned_tokens(name: str) -> torch.Tensor | None:
        values = on_this_rank(per_token[name])
        return None if values is None else values.flatten(0, 1).index_select(0, rows)

    learned = {name: of_learned_tokens(name) for name in per_token}
    target, response_positions = learned["target"], learned["response_positions"]
    assert target is not None
    assert response_positions is not None
    return MicroBatch(
        example_indices=tuple(indices),
        layout=layout,
        positions=positions,
        num_padding=int((~is_token).sum()),
        rows=rows,
        target=target,
        response_positions=response_positions,
        inputs=_loss_inputs(learned),
        packed_seq_params=packed_sequences(layout.bounds, context_parallel_size) if layout.packed else None,
        **{name: on_this_rank(values) for name, values in whole.items()},  # type: ignore[arg-type]
    )


def _response_fields(
    examples: Sequence[TrainingExample],
    indices: Sequence[int],
    layout: TokenLayout,
    is_split: bool,
    log_prob_floor: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Which positions predict a token to learn from, and what is known of each, [rows, length, ...] of the uncut layout."""
    predicting = _Spans(layout, [0] * len(examples), [len(e.token_ids) - 1 for e in examples])
    responses = _Spans(
        layout,
        [e.response_slice.start for e in examples],
        [e.response_slice.stop - e.response_slice.start for e in examples],
    )
    learned = responses.repeat(torch.tensor([e.trainable for e in examples]))
    log_probs = [e.rollout_log_probs for e in examples if e.rollout_log_probs is not None]
    if len(log_probs) == len(examples):
        learned = learned & (torch.cat(log_probs) >= log_prob_floor)
    lengths = starts = None
    if is_split:  # a rank that holds part of a sequence cannot count it by itself
        so_far = learned.cumsum(0)
        ends = responses.lengths.cumsum(0)
        before = torch.cat([so_far.new_zeros(1), so_far])[ends - responses.lengths]
        lengths = responses.write(responses.repeat(so_far[ends - 1] - before))
        starts = responses.write(learned & (so_far - responses.repeat(before) == 1))
    return responses.write(learned), {
        "target": predicting.write(torch.cat([e.token_ids[1:] for e in examples]).long()),
        "response_positions": responses.write(torch.cat([torch.arange(int(n)) for n in responses.lengths])),
        "advantages": responses.write(responses.repeat(torch.tensor([e.advantage for e in examples]))),
        "rollout_log_probs": responses.write_given([e.rollout_log_probs for e in examples]),
        "topk_ids": responses.write_given([None if e.topk_ids is None else e.topk_ids.long() for e in examples]),
        "topk_log_probs": responses.write_given([e.topk_log_probs for e in examples]),
        "ref_log_probs": responses.write_given([e.ref_log_probs for e in examples]),
        "ids": responses.write(responses.repeat(torch.tensor(indices))),
        "lengths": lengths,
        "starts": starts,
    }


def _loss_inputs(of_token: dict[str, torch.Tensor | None]) -> LossInputs | None:
    """The fields [n] as the loss takes them; every token counts. None without rollout log-probs."""
    if of_token["rollout_log_probs"] is None:
        return None
    topk_ids, topk_log_probs = of_token["topk_ids"], of_token["topk_log_probs"]
    if (topk_ids is None) != (topk_log_probs is None):
        raise ValueError("an example's topk_ids and topk_log_probs must come together")
    values: dict[str, Any] = of_token
    return LossInputs(
        target=values["target"],
        loss_mask=None,
        advantages=values["advantages"],
        rollout_log_probs=values["rollout_log_probs"],
        rollout_topk=None if topk_ids is None else TopK(ids=values["topk_ids"], log_probs=values["topk_log_probs"]),
        ref_log_probs=values["ref_log_probs"],
        sequences=Sequences(ids=values["ids"], lengths=values["lengths"], starts=values["starts"]),
    )


class _Spans:
    """A run of consecutive positions in each sequence of a layout, ``offsets`` after its start and ``lengths`` long."""

    def __init__(self, layout: TokenLayout, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        self._shape = (layout.rows, layout.length)
        self.lengths = torch.tensor(lengths)
        starts = [row * layout.length + at + offset for (row, at), offset in zip(layout.places, offsets, strict=True)]
        before = self.lengths.cumsum(0) - self.lengths
        self._at = torch.arange(int(self.lengths.sum())) + self.repeat(torch.tensor(starts) - before)

    def repeat(self, values: torch.Tensor) -> torch.Tensor:
        """One value per sequence -> one per position."""
        return values.repeat_interleave(self.lengths)

    def write(self, values: torch.Tensor) -> torch.Tensor:
        """[all positions, ...] -> [rows, length, ...], 0 elsewhere."""
        tensor = values.new_zeros(self._shape[0] * self._shape[1], *values.shape[1:])
        tensor[self._at] = values
        return tensor.unflatten(0, self._shape)

    def write_given(self, values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """[run, ...] of each sequence -> [rows, length, ...]; None if no sequence has it."""
        present = [value for value in values if value is not None]
        if not present:
            return None
        if len(present) != len(values):
            raise ValueError("a per-token quantity must be given for all examples of a batch or for none")
        if [len(value) for value in present] != self.lengths.tolist():
            raise ValueError("a per-token quantity does not have as many rows as its example has tokens for it")
        return self.write(torch.cat(present))
