"""Micro-batches: per-token values stand where their token is predicted, padded or packed, on every context-parallel rank."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dppo.rollout.sample import Prompt, Sample
from megatron_dppo.training.data.micro_batch import (
    MicroBatch,
    TrainingExample,
    example_from_sample,
    make_micro_batch,
)
from megatron_dppo.training.data.token_layout import TokenLayout, packed_layout, padded_layout, round_up

CPU = torch.device("cpu")


def example(prompt: int, response: int, first_token: int = 1, **fields) -> TrainingExample:
    ids = torch.arange(first_token, first_token + prompt + response)
    return TrainingExample(ids, prompt, rollout_log_probs=-torch.arange(1.0, response + 1), **fields)


def layout_of(examples: list[TrainingExample], packed: bool, context_parallel_size: int = 1) -> TokenLayout:
    multiple = 2 * context_parallel_size if context_parallel_size > 1 else 1
    lengths = [len(e.token_ids) for e in examples]
    if packed:
        return packed_layout(lengths, multiple, sum(round_up(n, multiple) for n in lengths) + 2 * multiple)
    return padded_layout(lengths, round_up(max(lengths), multiple))


def test_values_stand_at_the_position_that_predicts_their_token():
    batch = make_micro_batch([example(3, 2, advantage=0.5)], [7], padded_layout([5], 6))
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert batch.rows.tolist() == [2, 3]
    assert batch.target.tolist() == batch.inputs.target.tolist() == [4, 5]
    assert batch.inputs.loss_mask is None  # every one of them counts
    assert batch.inputs.rollout_log_probs.tolist() == [-1, -2]
    assert batch.inputs.advantages.tolist() == [0.5, 0.5]
    assert batch.inputs.sequences.ids.tolist() == [7, 7]
    assert batch.num_padding == 1
    assert batch.describe(1) == "example 7 of this step (row 0, position 3)"
    assert batch.packed_seq_params is None


def test_a_packed_row_holds_whole_sequences_whose_positions_begin_anew():
    examples = [example(1, 2), example(2, 2, first_token=11)]
    batch = make_micro_batch(examples, [4, 2], packed_layout([3, 4], 1, 8))
    assert batch.tokens.tolist() == [[1, 2, 3, 11, 12, 13, 14, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch.rows.tolist() == [0, 1, 4, 5]  # the last token of one sequence does not predict the next
    assert batch.target.tolist() == [2, 3, 13, 14]
    assert batch.inputs.sequences.ids.tolist() == [4, 4, 2, 2]
    assert batch.num_padding == 1
    assert batch.packed_seq_params.cu_seqlens_q.tolist() == [0, 3, 7, 8]
    assert batch.packed_seq_params.max_seqlen_q == 4


def test_topk_values_and_routed_experts_follow_their_tokens():
    ids, experts = torch.tensor([[5, 6], [7, 8]]), torch.arange(1, 25, dtype=torch.int32).view(3, 4, 2)
    examples = [
        example(2, 2, topk_ids=ids, topk_log_probs=-ids.float(), routed_experts=experts),
        example(1, 1, topk_ids=ids[:1], topk_log_probs=-ids[:1].float(), routed_experts=experts[:1]),
    ]
    batch = make_micro_batch(examples, [0, 1], padded_layout([4, 2], 4))
    assert batch.rows.tolist() == [1, 2, 4]
    topk = batch.inputs.rollout_topk
    assert topk.ids.tolist() == [[5, 6], [7, 8], [5, 6]]
    assert torch.equal(topk.log_probs, -topk.ids.float())
    assert batch.target.tolist() == [3, 4, 2]
    assert torch.equal(batch.routed_experts[0, :3], experts)
    assert torch.equal(batch.routed_experts[1, :1], experts[:1])
    assert batch.routed_experts[0, 3:].sum() == batch.routed_experts[1, 1:].sum() == 0


@settings(max_examples=25)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=5),
    packed=st.booleans(),
    ranks=st.sampled_from([1, 2, 3]),
)
def test_the_ranks_parts_put_together_are_the_whole(sizes, packed, ranks):
    """Results of response tokens go back to their examples, whatever the layout and however many ranks share it."""
    examples = [example(p, r, first_token=100 * i, advantage=float(i)) for i, (p, r) in enumerate(sizes)]
    layout = layout_of(examples, packed, ranks)
    parts = [make_micro_batch(examples, range(len(examples)), layout, ranks, rank) for rank in range(ranks)]
    whole = sum(part.in_layout(part.target.float()) for part in parts)
    for item, (row, start) in zip(examples, layout.places, strict=True):
        values = whole[row, start:][item.response_slice]
        assert values.tolist() == item.token_ids[item.prompt_length :].tolist()
    assert whole.count_nonzero() == sum(response for _, response in sizes)
    if ranks > 1:
        _check_split_sequences(examples, parts)


def _check_split_sequences(examples: list[TrainingExample], parts: list[MicroBatch]) -> None:
    """Every sequence is begun on one rank, and its tokens say how long it is on all of them."""
    ids, lengths, starts = (
        torch.cat([getattr(part.inputs.sequences, name) for part in parts]) for name in ("ids", "lengths", "starts")
    )
    responses = torch.tensor([len(e.token_ids) - e.prompt_length for e in examples])
    assert torch.equal(lengths, responses[ids])
    assert sorted(ids[starts].tolist()) == list(range(len(examples)))


def test_padding_inside_a_packed_row_counts_as_part_of_its_sequence():
    """Core has to see every sequence cut into 2 CP equal chunks, and attention kernels no gaps."""
    examples = [example(2, 3), example(1, 1)]
    batch = make_micro_batch(examples, [0, 1], packed_layout([5, 2], 4, 12), 2, 1)
    assert batch.shape == (1, 6)
    params = batch.packed_seq_params
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv_padded.tolist() == [0, 8, 12]
    assert all((end - start) % 4 == 0 for start, end in pairwise(params.cu_seqlens_q.tolist()))
    assert batch.tokens.tolist() == [[3, 4, 5, 0, 2, 0]]  # chunks 1 and 2 of four of each sequence


def test_a_sample_teaches_what_its_response_earned():
    topk_ids, topk_log_probs = torch.tensor([[3, 5], [4, 6]]), torch.tensor([[-0.5, -2.0], [-0.25, -3.0]])
    sample = Sample(
        Prompt("p/0", (1, 2)), [3, 4], [-0.5, -0.25], "stop", [(1, 2)], topk_ids=topk_ids, topk_log_probs=topk_log_probs
    )
    batch = make_micro_batch([example_from_sample(sample, -1.5)], [0], padded_layout([4], 4))
    assert batch.inputs.target.tolist() == [3, 4]
    assert batch.inputs.advantages.tolist() == [-1.5, -1.5]
    assert batch.inputs.rollout_log_probs.tolist() == [-0.5, -0.25]
    assert torch.equal(batch.inputs.rollout_topk.ids.long(), topk_ids)
    assert torch.equal(batch.inputs.rollout_topk.log_probs, topk_log_probs)


def test_an_aborted_sample_keeps_its_place_but_teaches_nothing():
    sample = Sample(Prompt("p/0", (1, 2)), [3, 4], [-0.5, -0.25], "abort", [(1, 2)])
    batch = make_micro_batch([example_from_sample(sample, 1.0)], [0], padded_layout([4], 4), 1, 0)
    assert batch.tokens.tolist() == [[1, 2, 3, 4]]
    assert batch.rows.shape == batch.target.shape == batch.inputs.advantages.shape == (0,)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_token_whose_log_prob_the_engine_lost_teaches_nothing_and_counts_for_nothing(packed, ranks):
    log_probs = [torch.tensor([-3.4e38, -1.0, -18.0]), torch.tensor([-12.0, -30.1]), torch.tensor([-3.4e38])]
    examples = [
        TrainingExample(torch.arange(2 + len(values)) + 10 * i, 2, rollout_log_probs=values)
        for i, values in enumerate(log_probs)
    ]
    layout = layout_of(examples, packed, ranks)
    parts = [make_micro_batch(examples, range(3), layout, ranks, rank, log_prob_floor=-30.0) for rank in range(ranks)]
    kept = sorted(
        zip(
            *(torch.cat([getattr(p.inputs, n) for p in parts]).tolist() for n in ("rollout_log_probs", "target")),
            strict=True,
        )
    )
    assert kept == [(-18.0, 4), (-12.0, 12), (-1.0, 3)]
    if ranks > 1:
        sequences = [part.inputs.sequences for part in parts]
        ids, lengths, starts = (
            torch.cat([getattr(s, name) for s in sequences]) for name in ("ids", "lengths", "starts")
        )
        assert dict(zip(ids.tolist(), lengths.tolist(), strict=True)) == {0: 2, 1: 1}
        assert sorted(ids[starts].tolist()) == [0, 1]  # each of them is begun once


def test_examples_without_rollout_log_probs_are_for_supervised_learning():
    batch = make_micro_batch([TrainingExample(torch.tensor([1, 2, 3]), 1)], [0], padded_layout([3], 3))
    assert batch.inputs is None
    assert batch.target.tolist() == [2, 3]


def test_a_per_token_value_for_some_examples_only_or_of_the_wrong_length_is_refused():
    layout = padded_layout([2, 2], 2)
    with pytest.raises(ValueError, match="for all examples of a batch or for none"):
        make_micro_batch([example(1, 1), example(1, 1, ref_log_probs=torch.zeros(1))], [0, 1], layout)
    with pytest.raises(ValueError, match="as many rows"):
        make_micro_batch([example(1, 1, ref_log_probs=torch.zeros(2))] * 2, [0, 1], layout)


META = torch.device("meta")


def _packed_batch(context_parallel_size: int = 1) -> MicroBatch:
    multiple = 2 * context_parallel_size if context_parallel_size > 1 else 1
    layout = packed_layout([3, 4], multiple, 8 * context_parallel_size)
    return make_micro_batch([example(1, 2), example(2, 2)], [0, 1], layout, context_parallel_size)


@pytest.mark.parametrize("on_device", [False, True])
def test_all_of_a_micro_batch_moves_to_a_device_but_for_what_core_reads_on_the_host(on_device: bool):
    batch = _packed_batch().to(META, core_reads_bounds_on_device=on_device)
    assert {t.device.type for t in vars(batch).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert batch.inputs.advantages.device == batch.inputs.sequences.ids.device == META
    params = batch.packed_seq_params
    assert params.cu_seqlens.device == META
    assert params.cu_seqlens_q.device.type == params.cu_seqlens_kv.device.type == ("meta" if on_device else "cpu")


@pytest.mark.parametrize("context_parallel_size", [1, 2])
def test_what_was_one_tensor_is_one_tensor_on_the_device(context_parallel_size: int):
    """On the meta device, as on a GPU, ``.to`` makes a new tensor with every call; on a CPU it would hide the difference."""
    here = _packed_batch(context_parallel_size)
    there = here.to(META, core_reads_bounds_on_device=True)
    assert here.target is here.inputs.target
    assert there.target is there.inputs.target
    params = there.packed_seq_params
    assert params.cu_seqlens_q is params.cu_seqlens_kv is params.cu_seqlens
    if context_parallel_size > 1:
        assert params.cu_seqlens_q_padded is params.cu_seqlens_kv_padded is params.cu_seqlens_q
    else:  # Transformer Engine would ask whether they differ
        assert params.cu_seqlens_q_padded is None
        assert params.cu_seqlens_kv_padded is None


def test_no_padding_between_packed_sequences_is_claimed_where_core_asks():
    known = {field.name for field in dataclasses.fields(PackedSeqParams)}
    assert getattr(_packed_batch().packed_seq_params, "pad_between_seqs", False) is False
    assert hasattr(_packed_batch().packed_seq_params, "pad_between_seqs") == ("pad_between_seqs" in known)
