"""What every rollout engine promises, as functions that run against any of them.

    @pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
    def test_contract(check, subject):
        check(subject)

``subject`` is an ``EngineUnderTest``: the engine, a transformers model (fp32, eval mode) with the same weights, and the
one thing that differs between engines: how new weights get into it. Checks leave the engine usable, so one engine serves
them all; only ``check_closing_twice_is_safe`` ends it, and it comes last in ``CONTRACT``. On an engine of several ranks
every rank runs the same checks.

Tolerance of log-probs: engine and reference compute the same fp32 network with different kernels and summation orders.
A logit of magnitude ~4 carries some tens of roundings of 2^-24 relative (attention, two layers, a dot product over the
hidden size), i.e. ~5e-6; log-softmax adds one rounding. 2e-5 leaves a factor of four, and dividing by a temperature
below 1 magnifies the error accordingly. Any real fault (a wrong position, mask, temperature or row) costs 1e-3 or more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from megatron_dppo.errors import RolloutError
from megatron_dppo.rollout.engine import RolloutEngine
from megatron_dppo.rollout.sample import Prompt, Sample, SamplingParams

LOG_PROB_TOLERANCE = 2e-5


@dataclass(frozen=True)
class EngineUnderTest:
    """An engine and what is needed to judge it.

    Attributes:
        engine: serves the weights of ``hf_model``.
        hf_model: the reference, fp32, in eval mode; its ``config.vocab_size`` is the true vocabulary size.
        serve: ``serve(hf_model, version)`` makes the engine serve that model's weights by ``engine.update_weights``.
        log_prob_tolerance: at temperature 1; see the module docstring.
    """

    engine: RolloutEngine
    hf_model: torch.nn.Module
    serve: Callable[[torch.nn.Module, int], None]
    log_prob_tolerance: float = LOG_PROB_TOLERANCE

    @property
    def vocab_size(self) -> int:
        return int(self.hf_model.config.vocab_size)


def make_prompts(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[Prompt]:
    """Random prompts of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(f"prompt/{i}", tuple(torch.randint(0, vocab_size, (n,), generator=generator).tolist()), {"index": i})
        for i, n in enumerate(lengths)
    ]


@torch.no_grad()
def reference_log_probs(hf_model: torch.nn.Module, sample: Sample, temperature: float) -> torch.Tensor:
    """[T, V] log-probs of softmax(logits / temperature) at each response position, one whole forward, no padding."""
    logits_SV = hf_model(torch.tensor([sample.token_ids])).logits[0].float()
    first = len(sample.prompt.token_ids) - 1
    return torch.log_softmax(logits_SV[first : first + len(sample.response_ids)] / (temperature or 1.0), dim=-1)


def assert_log_probs_match(subject: EngineUnderTest, samples: Sequence[Sample], temperature: float) -> None:
    """Every sample's log-probs are the reference's at the sampled tokens."""
    tolerance = subject.log_prob_tolerance / min(temperature or 1.0, 1.0)
    for sample in samples:
        sample.check()
        expected_TV = reference_log_probs(subject.hf_model, sample, temperature)
        expected = expected_TV.gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.rollout_log_probs), expected, rtol=0.0, atol=tolerance)


def check_samples_come_in_prompt_order(subject: EngineUnderTest) -> None:
    """One block of samples_per_prompt samples per prompt, with the prompt's index as group id and its own metadata."""
    prompts = make_prompts(subject.vocab_size, [5, 3, 7])
    samples = subject.engine.generate(prompts, SamplingParams(max_new_tokens=4, samples_per_prompt=3))
    assert [sample.group_id for sample in samples] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all(sample.prompt == prompts[sample.group_id] for sample in samples)
    assert len({tuple(sample.response_ids) for sample in samples}) > 3, "samples of one prompt must be independent"


def check_no_prompts_give_no_samples(subject: EngineUnderTest) -> None:
    assert subject.engine.generate([], SamplingParams(max_new_tokens=4)) == []


def check_log_probs_are_those_of_the_sampled_distribution(subject: EngineUnderTest) -> None:
    """At several temperatures the log-probs are those of softmax(logits / temperature) over the true vocabulary."""
    prompts = make_prompts(subject.vocab_size, [6, 6])
    for temperature in (1.0, 0.7, 1.5):
        params = SamplingParams(max_new_tokens=8, temperature=temperature, samples_per_prompt=2, seed=3)
        samples = subject.engine.generate(prompts, params)
        assert all(0 <= token < subject.vocab_size for sample in samples for token in sample.response_ids)
        assert_log_probs_match(subject, samples, temperature)


def check_prompts_of_different_lengths(subject: EngineUnderTest) -> None:
    """A short prompt gets the same distribution next to a long one as alone."""
    prompts = make_prompts(subject.vocab_size, [1, 17, 4, 9])
    samples = subject.engine.generate(prompts, SamplingParams(max_new_tokens=6, samples_per_prompt=2, seed=5))
    assert_log_probs_match(subject, samples, 1.0)


def check_greedy_takes_the_most_likely_token(subject: EngineUnderTest) -> None:
    """Temperature 0 takes the argmax, and the log-probs are those of the unscaled softmax."""
    prompts = make_prompts(subject.vocab_size, [4, 11])
    samples = subject.engine.generate(prompts, SamplingParams(max_new_tokens=8, temperature=0.0))
    assert_log_probs_match(subject, samples, 0.0)
    for sample in samples:
        expected_TV = reference_log_probs(subject.hf_model, sample, 0.0)
        chosen = expected_TV.gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        # Two tokens may be closer together than the kernels' difference; the chosen one is then as good as the argmax.
        assert (expected_TV.max(dim=-1).values - chosen).max() <= 2 * subject.log_prob_tolerance


def check_stop_tokens_end_a_response_and_belong_to_it(subject: EngineUnderTest) -> None:
    """A stop token appears only as the last token, with reason ``stop``; the others end at max_new_tokens."""
    # With a quarter of the vocabulary as stop tokens, some responses end at once and some reach the limit.
    stop = tuple(range(0, subject.vocab_size, 4))
    params = SamplingParams(max_new_tokens=5, samples_per_prompt=16, stop_token_ids=stop, seed=7)
    samples = subject.engine.generate(make_prompts(subject.vocab_size, [3, 8]), params)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert not set(sample.response_ids[:-1]) & set(stop)
        assert (sample.response_ids[-1] in stop) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.response_ids) == 5
    assert_log_probs_match(subject, samples, 1.0)


def check_responses_end_at_max_new_tokens(subject: EngineUnderTest) -> None:
    for limit in (1, 5):
        samples = subject.engine.generate(make_prompts(subject.vocab_size, [4]), SamplingParams(max_new_tokens=limit))
        assert [len(sample.response_ids) for sample in samples] == [limit]
        assert samples[0].finish_reason == "length"


def check_topk_log_probs(subject: EngineUnderTest) -> None:
    """Top-K ids are the most likely tokens, sorted, of the same distribution as the sampled token's log-prob."""
    k = min(5, subject.engine.max_topk_log_probs)
    assert k >= 1
    sampled_in_topk = 0
    for temperature in (1.0, 0.7):
        tolerance = subject.log_prob_tolerance / temperature
        params = SamplingParams(
            max_new_tokens=6, temperature=temperature, samples_per_prompt=4, topk_log_probs=k, seed=11
        )
        for sample in subject.engine.generate(make_prompts(subject.vocab_size, [5, 2]), params):
            sample.check()
            assert sample.topk_ids is not None
            assert sample.topk_log_probs is not None
            assert sample.topk_ids.dtype == torch.int64
            assert sample.topk_log_probs.dtype == torch.float32
            assert sample.topk_ids.shape == sample.topk_log_probs.shape == (len(sample.response_ids), k)
            assert bool((sample.topk_log_probs.diff(dim=-1) <= 0).all())
            assert all(len(set(row)) == k for row in sample.topk_ids.tolist())
            expected_TV = reference_log_probs(subject.hf_model, sample, temperature)
            torch.testing.assert_close(
                sample.topk_log_probs, expected_TV.gather(-1, sample.topk_ids), rtol=0.0, atol=tolerance
            )
            torch.testing.assert_close(
                sample.topk_log_probs, expected_TV.topk(k, dim=-1).values, rtol=0.0, atol=tolerance
            )
            for position, token in enumerate(sample.response_ids):
                for slot in (sample.topk_ids[position] == token).nonzero()[:, 0].tolist():
                    sampled = sample.rollout_log_probs[position]
                    # One engine, one distribution: only the way the number travelled (binary, JSON) may differ.
                    assert abs(sample.topk_log_probs[position, slot].item() - sampled) < 1e-6
                    sampled_in_topk += 1
    assert sampled_in_topk > 0, "the last comparison compared nothing"


def check_topk_is_absent_unless_asked_for(subject: EngineUnderTest) -> None:
    (sample,) = subject.engine.generate(make_prompts(subject.vocab_size, [4]), SamplingParams(max_new_tokens=2))
    assert sample.topk_ids is None
    assert sample.topk_log_probs is None


@torch.no_grad()
def reference_router_logits(hf_model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """[prompt + T - 1, layers, experts]: every token that was read, one whole forward, no padding."""
    per_layer: list[torch.Tensor] = []

    def keep(gate: torch.nn.Module, args: tuple[torch.Tensor, ...], _: object) -> None:
        per_layer.append(args[0].flatten(0, -2) @ gate.weight.T)

    handles = [layer.mlp.gate.register_forward_hook(keep) for layer in hf_model.model.layers]
    hf_model(torch.tensor([sample.token_ids[:-1]]))
    for handle in handles:
        handle.remove()
    return torch.stack(per_layer, dim=1)


def check_routed_experts_are_the_routers_choices(subject: EngineUnderTest) -> None:
    """Of every token but the last, prompts whose keys were cached included; absent unless asked for."""
    prompts = make_prompts(subject.vocab_size, [4, 9, 1])
    stop = tuple(range(0, subject.vocab_size, 6))
    params = SamplingParams(
        max_new_tokens=6, samples_per_prompt=3, stop_token_ids=stop, seed=19, return_routed_experts=True
    )
    if not getattr(subject.hf_model.config, "num_experts", 0):
        with pytest.raises(ValueError, match="expert"):
            subject.engine.generate(prompts, params)
        return
    for _ in range(2):  # the second time, an engine that caches prefixes knows the prompts
        for sample in subject.engine.generate(prompts, params):
            sample.check()
            assert sample.routed_experts is not None
            assert sample.routed_experts.dtype == torch.int32
            logits_SLE = reference_router_logits(subject.hf_model, sample)
            chosen_SLk = logits_SLE.gather(-1, sample.routed_experts.long()).sort(dim=-1, descending=True).values
            # Two experts may be closer together than the kernels' difference; either is then as good as the other.
            torch.testing.assert_close(
                chosen_SLk,
                logits_SLE.topk(chosen_SLk.shape[-1], dim=-1).values,
                rtol=0.0,
                atol=2 * subject.log_prob_tolerance,
            )
    samples = subject.engine.generate(prompts, SamplingParams(max_new_tokens=1))
    assert all(sample.routed_experts is None for sample in samples)


def check_same_seed_gives_the_same_responses(subject: EngineUnderTest) -> None:
    prompts = make_prompts(subject.vocab_size, [6, 3])
    params = [SamplingParams(max_new_tokens=8, samples_per_prompt=4, seed=seed) for seed in (1, 1, 2)]
    first, again, other = ([s.response_ids for s in subject.engine.generate(prompts, p)] for p in params)
    assert first == again
    assert first != other


def check_every_token_carries_the_weight_version(subject: EngineUnderTest) -> None:
    version = subject.engine.weight_version
    samples = subject.engine.generate(make_prompts(subject.vocab_size, [4, 5]), SamplingParams(max_new_tokens=3))
    assert [sample.weight_versions for sample in samples] == [[(version, 3)], [(version, 3)]]


def check_new_weights_are_used_after_an_update(subject: EngineUnderTest) -> None:
    """After an update the log-probs are the new model's, far from the old one's, and the version says so."""
    changed = copy.deepcopy(subject.hf_model)
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std().clamp(min=0.02) * 0.5)
    version = subject.engine.weight_version + 1
    prompts = make_prompts(subject.vocab_size, [5, 9])
    params = SamplingParams(max_new_tokens=6, samples_per_prompt=2, seed=17)
    try:
        subject.serve(changed, version)
        samples = subject.engine.generate(prompts, params)
    finally:
        subject.serve(subject.hf_model, version + 1)
    assert all(sample.weight_versions == [(version, 6)] for sample in samples)
    assert_log_probs_match(
        EngineUnderTest(subject.engine, changed, subject.serve, subject.log_prob_tolerance), samples, 1.0
    )
    with pytest.raises(AssertionError):
        assert_log_probs_match(subject, samples, 1.0)
    assert subject.engine.weight_version == version + 1
    assert_log_probs_match(subject, subject.engine.generate(prompts, params), 1.0)


def check_bad_prompts_are_refused(subject: EngineUnderTest) -> None:
    """A foreign token id or an empty prompt is one clear error naming the prompt; the engine lives on."""
    for token_ids in ((), (1, subject.vocab_size), (-1,)):
        with pytest.raises(ValueError, match="bad/prompt"):
            subject.engine.generate([Prompt("bad/prompt", token_ids)], SamplingParams(max_new_tokens=2))
    subject.engine.health()


def check_too_many_topk_log_probs_are_refused(subject: EngineUnderTest) -> None:
    params = SamplingParams(max_new_tokens=2, topk_log_probs=subject.engine.max_topk_log_probs + 1)
    with pytest.raises(ValueError, match="topk_log_probs"):
        subject.engine.generate(make_prompts(subject.vocab_size, [4]), params)


def check_closing_twice_is_safe(subject: EngineUnderTest) -> None:
    subject.engine.health()
    subject.engine.close()
    subject.engine.close()
    with pytest.raises(RolloutError):
        subject.engine.health()


CONTRACT: list[Callable[[EngineUnderTest], None]] = [
    check_samples_come_in_prompt_order,
    check_no_prompts_give_no_samples,
    check_log_probs_are_those_of_the_sampled_distribution,
    check_prompts_of_different_lengths,
    check_greedy_takes_the_most_likely_token,
    check_stop_tokens_end_a_response_and_belong_to_it,
    check_responses_end_at_max_new_tokens,
    check_topk_log_probs,
    check_topk_is_absent_unless_asked_for,
    check_routed_experts_are_the_routers_choices,
    check_same_seed_gives_the_same_responses,
    check_every_token_carries_the_weight_version,
    check_new_weights_are_used_after_an_update,
    check_bad_prompts_are_refused,
    check_too_many_topk_log_probs_are_refused,
    check_closing_twice_is_safe,
]
