"""Micro-batches: alignment of per-token values with logits, padding, grouping."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo.rollout.sample import Prompt, Sample
from megatron_dppo.training.batch import TrainingExample, example_from_sample, make_micro_batches


def example(prompt: int, response: int, first_token: int = 1, **fields) -> TrainingExample:
    ids = list(range(first_token, first_token + prompt + response))
    return TrainingExample(ids, prompt, rollout_log_probs=-torch.arange(1.0, response + 1), **fields)


def test_values_stand_at_the_position_that_predicts_their_token():
    (batch,) = make_micro_batches([example(3, 2, advantage=0.5)], 1, length_multiple=1, equal_shapes=False)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.target.tolist() == [[2, 3, 4, 5, 0]]
    assert batch.loss_mask.tolist() == [[False, False, True, True, False]]
    assert batch.rollout_log_probs.tolist() == [[0, 0, -1, -2, 0]]
    assert batch.advantages.tolist() == [[0, 0, 0.5, 0.5, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]]


def test_micro_batches_hold_sequences_of_similar_length_and_say_which():
    examples = [example(1, n) for n in (7, 1, 6, 2, 3)]
    batches = make_micro_batches(examples, 2, length_multiple=4, equal_shapes=False)
    assert [batch.example_indices for batch in batches] == [(1, 3), (4, 2), (0,)]
    assert [batch.shape for batch in batches] == [(2, 4), (2, 8), (1, 8)]
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == 7 + 1 + 6 + 2 + 3


def test_a_pipeline_gets_equal_lengths():
    batches = make_micro_batches([example(1, n) for n in (9, 1, 2, 3)], 2, length_multiple=2, equal_shapes=True)
    assert {batch.shape for batch in batches} == {(2, 10)}


def test_topk_values_follow_their_tokens_through_padding():
    ids = torch.tensor([[5, 6], [7, 8]])
    examples = [
        example(2, 2, topk_ids=ids, topk_log_probs=-ids.float()),
        example(1, 1, topk_ids=ids[:1], topk_log_probs=-ids[:1].float()),
    ]
    (batch,) = make_micro_batches(examples, 2, length_multiple=1, equal_shapes=False)
    assert batch.rollout_topk_ids.tolist() == [[[5, 6], [0, 0], [0, 0], [0, 0]], [[0, 0], [5, 6], [7, 8], [0, 0]]]
    assert torch.equal(batch.rollout_topk_log_probs, -batch.rollout_topk_ids.float())


def test_an_aborted_sample_keeps_its_place_but_teaches_nothing():
    sample = Sample(Prompt("p/0", (1, 2)), [3, 4], [-0.5, -0.25], "abort", [(1, 2)])
    (batch,) = make_micro_batches([example_from_sample(sample, 1.0)], 1, length_multiple=1, equal_shapes=False)
    assert batch.tokens.tolist() == [[1, 2, 3, 4]]
    assert not batch.loss_mask.any()


def test_a_per_token_value_for_some_examples_only_is_refused():
    with pytest.raises(ValueError, match="for all examples of a batch or for none"):
        make_micro_batches(
            [example(1, 1), example(1, 1, ref_log_probs=torch.zeros(1))], 2, length_multiple=1, equal_shapes=False
        )
