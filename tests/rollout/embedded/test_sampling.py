"""Drawing tokens from logits."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo.rollout.embedded.sampling import draw_tokens


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_drawn_tokens_follow_the_distribution(temperature):
    vocab_size, draws = 7, 20_000
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randn(vocab_size, generator=generator) * 1.5
    uniform = torch.rand(draws, generator=generator, dtype=torch.float64)
    tokens = draw_tokens(logits_V.expand(draws, -1), uniform, temperature, vocab_size, 0).token_ids
    expected = torch.softmax(logits_V / temperature, -1) * draws
    chi_square = ((torch.bincount(tokens, minlength=vocab_size) - expected) ** 2 / expected).sum().item()
    # 6 degrees of freedom: above 22.5 with a chance of 0.1 %. A temperature wrong by 10 % gives several hundred.
    assert chi_square < 22.5


def test_log_probs_are_those_of_the_sampled_distribution():
    logits = torch.randn(5, 11)
    draw = draw_tokens(logits, torch.rand(5, dtype=torch.float64), 0.7, 11, 0)
    expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, draw.token_ids[:, None])[:, 0]
    # Division, exponentials and sum in fp32: a few roundings of numbers below 10.
    torch.testing.assert_close(draw.log_probs.double(), expected, rtol=0, atol=5e-6)


def test_padded_columns_are_never_drawn_and_carry_no_probability():
    logits = torch.zeros(1000, 8)
    logits[:, 5:] = 50.0
    draw = draw_tokens(logits, torch.linspace(0, 1 - 2**-53, 1000, dtype=torch.float64), 1.0, 5, 5)
    assert set(draw.token_ids.tolist()) == set(range(5))
    torch.testing.assert_close(draw.log_probs, torch.full((1000,), 0.2).log())
    assert int(draw.topk_ids.max()) < 5


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.tensor([[-float("inf"), 0.0, -float("inf"), 0.0, -float("inf")]])
    uniform = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(logits.expand(4, -1), uniform, 1.0, 5, 0).token_ids.tolist() == [1, 1, 3, 3]


def test_rare_tokens_of_a_large_vocabulary_keep_their_share():
    # One token holds half of the mass, 150k others share the rest. Summed in fp32, the cumulative distribution would
    # move by many of their widths (3e-6 each).
    vocab_size = 150_001
    logits = torch.zeros(1, vocab_size)
    logits[0, 0] = torch.tensor(float(vocab_size - 1)).log()
    uniform = torch.tensor([0.75], dtype=torch.float64)
    assert abs(int(draw_tokens(logits, uniform, 1.0, vocab_size, 0).token_ids) - 75_001) <= 1


def test_temperature_zero_is_greedy_with_log_probs_of_the_plain_softmax():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    draw = draw_tokens(logits, torch.zeros(1, dtype=torch.float64), 0.0, 3, 2)
    assert draw.token_ids.tolist() == [1]
    torch.testing.assert_close(draw.log_probs, logits.log_softmax(-1)[:, 1])
    assert draw.topk_ids.tolist() == [[1, 2]]
