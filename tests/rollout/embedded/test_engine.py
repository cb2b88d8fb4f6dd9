"""What the embedded engine promises beyond the contract: it disturbs nothing, and batching changes nothing."""

from __future__ import annotations

import re

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_dppo.distributed.layout import ParallelConfig
from megatron_dppo.models.policy_head import PolicyHead, hidden_states_only
from megatron_dppo.rollout.embedded.engine import EmbeddedEngine
from megatron_dppo.rollout.sample import FailedSample, Sample, SamplingParams
from tests.rollout.embedded.embedded_subject import build_tiny_policy, embedded_subject
from tests.rollout.engine_contract import assert_log_probs_match, make_prompts


def _responses(samples: list[Sample]) -> list[list[int]]:
    return [sample.response_ids for sample in samples]


def _training_is_undisturbed() -> None:
    """Wrapped for training, in the middle of gradient accumulation, with some modules in eval mode on purpose."""
    (model,), hf_model = build_tiny_policy("qwen3_moe", ParallelConfig())
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    wrapped.train()
    model.decoder.layers[1].eval()
    for buffer in wrapped.buffers:
        buffer.grad_data.fill_(3.0)
    modes = [module.training for module in wrapped.modules()]
    attentions = [layer.self_attention.core_attention for layer in model.decoder.layers]
    hooks = ("forward" in vars(model.rotary_pos_emb), "forward" in vars(model.output_layer))
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch_state, tracker_states = torch.get_rng_state(), get_cuda_rng_tracker().get_states()

    engine = EmbeddedEngine([wrapped], hf_model.config.vocab_size)
    prompts = make_prompts(250, [3, 6])
    engine.generate(prompts, SamplingParams(max_new_tokens=4, samples_per_prompt=2))
    model.output_layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # an error in the middle must not leave anything behind either
        engine.generate(prompts, SamplingParams(max_new_tokens=4))

    assert modes == [module.training for module in wrapped.modules()]
    assert torch.equal(torch_state, torch.get_rng_state())
    assert all(torch.equal(a, tracker_states[k]) for k, a in get_cuda_rng_tracker().get_states().items())
    assert all(bool((buffer.grad_data == 3.0).all()) for buffer in wrapped.buffers)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert attentions == [layer.self_attention.core_attention for layer in model.decoder.layers]
    assert hooks == ("forward" in vars(model.rotary_pos_emb), "forward" in vars(model.output_layer))
    assert torch.is_grad_enabled()


def test_generating_disturbs_no_training_state(ranks):
    ranks(1).run(_training_is_undisturbed)


def _training_step_is_unchanged() -> None:
    """Loss and gradients of a step are bit for bit those without a generation before it."""

    def step(model: torch.nn.Module) -> list[torch.Tensor]:
        tokens = torch.arange(24).view(2, 12) * 7 % 250
        model.zero_grad()
        logits = model(tokens, torch.arange(12).expand(2, 12), None)
        logits.log_softmax(-1)[..., 5].sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    (model,), hf_model = build_tiny_policy("qwen3", ParallelConfig())
    model.train()
    before = step(model)
    EmbeddedEngine([model], hf_model.config.vocab_size).generate(
        make_prompts(250, [12, 5]), SamplingParams(max_new_tokens=12)
    )
    assert all(torch.equal(a, b) for a, b in zip(before, step(model), strict=True))


def test_a_training_step_after_a_generation_is_unchanged(ranks):
    ranks(1).run(_training_step_is_unchanged)


def _batches_do_not_matter() -> None:
    stop = tuple(range(0, 250, 5))
    params = SamplingParams(max_new_tokens=8, samples_per_prompt=5, stop_token_ids=stop, topk_log_probs=3, seed=3)
    responses = []
    for subject in _subjects_with_batch_sizes(64, 7, 1):
        samples = subject.engine.generate(make_prompts(250, [4, 2, 9]), params)
        assert_log_probs_match(subject, samples, 1.0)
        responses.append(_responses(samples))
    # The uniform numbers are the same, the distributions differ by rounding only (1e-6): of at most 120 tokens, one lies
    # that close to a boundary with a chance below 1e-3, and the seed is fixed.
    assert responses[0] == responses[1] == responses[2]


def _subjects_with_batch_sizes(*sizes: int):
    from megatron.core import parallel_state

    for size in sizes:
        yield embedded_subject("qwen3", ParallelConfig(), max_batch_size=size)
        parallel_state.destroy_model_parallel()


def test_the_batch_size_does_not_change_the_responses(ranks):
    ranks(1).run(_batches_do_not_matter)


def _bf16_log_probs() -> float:
    """Largest error of the log-probs against fp32, relative to what the same bf16 weights give in transformers."""
    model_chunks, hf_model = build_tiny_policy("qwen3", ParallelConfig(), dtype=torch.bfloat16)
    engine = EmbeddedEngine(model_chunks, hf_model.config.vocab_size)
    samples = engine.generate(make_prompts(250, [5, 9]), SamplingParams(max_new_tokens=8, samples_per_prompt=8))
    rounded = hf_model.to(torch.bfloat16)

    def error(model: torch.nn.Module, reference: torch.nn.Module, sample: Sample) -> tuple[float, float]:
        ids = torch.tensor([sample.token_ids])
        first, length = len(sample.prompt.token_ids) - 1, len(sample.response_ids)
        index = torch.tensor(sample.response_ids)[:, None]
        with torch.no_grad():
            theirs, exact = (
                m(ids).logits[0, first : first + length].float().log_softmax(-1).gather(-1, index)[:, 0]
                for m in (model, reference)
            )
        ours = torch.tensor(sample.rollout_log_probs)
        return (ours - exact).abs().mean().item(), (theirs - exact).abs().mean().item()

    import copy

    exact_model = copy.deepcopy(rounded).float()
    errors = torch.tensor([error(rounded, exact_model, sample) for sample in samples]).mean(dim=0)
    for sample in samples:
        sample.check()
    return (errors[0] / errors[1]).item()


def test_bf16_policies_lose_no_more_than_transformers_does(ranks):
    # Both round to bf16 after every operation; twice the error of the same-dtype reference is the usual allowance.
    assert ranks(1).run(_bf16_log_probs)[0] < 2.0


def _distance_to_the_trainers_head(fp32_head: bool) -> float:
    """Largest difference between log-probs of first tokens and those of the fp32 logits that the trainer computes."""
    (model,), hf_model = build_tiny_policy("qwen3", ParallelConfig(), dtype=torch.bfloat16, fp32_head=fp32_head)
    engine = EmbeddedEngine([model], hf_model.config.vocab_size)
    samples = engine.generate(make_prompts(250, 8 * [12]), SamplingParams(max_new_tokens=1, samples_per_prompt=8))
    model.fp32_head = True
    head, worst = PolicyHead(model), 0.0
    for sample in samples:
        tokens = torch.tensor([sample.prompt.token_ids])
        with torch.no_grad(), hidden_states_only(model):
            hidden = model(tokens, torch.arange(tokens.shape[1])[None], None)
            logits = head.logits(head.response_hidden(hidden, torch.tensor([tokens.shape[1] - 1]), tuple(tokens.shape)))
        log_prob = logits[0, :250].log_softmax(-1)[sample.response_ids[0]]
        worst = max(worst, abs(log_prob.item() - sample.rollout_log_probs[0]))
    return worst


def test_the_logits_of_a_policy_with_an_fp32_head_are_not_rounded(ranks):
    # Prefill and training forward compute the same bf16 hidden states. fp32: roundings of sums of 64; a bf16 logit between 4
    # and 8 is off by up to 0.016.
    assert ranks(1).run(_distance_to_the_trainers_head, True)[0] < 1e-5
    assert ranks(1).run(_distance_to_the_trainers_head, False)[0] > 1e-3


def _what_cannot_be_served() -> None:
    model_chunks, _ = build_tiny_policy("qwen3", ParallelConfig())
    with pytest.raises(ValueError, match="max_batch_size"):
        EmbeddedEngine(model_chunks, 250, max_batch_size=0)
    engine = EmbeddedEngine(model_chunks, 250)
    with pytest.raises(ValueError, match=r"prompt/0 .* needs 130 positions, the policy has 128"):
        engine.generate(make_prompts(250, [100]), SamplingParams(max_new_tokens=30))
    with torch.no_grad():
        model_chunks[0].decoder.final_layernorm.weight[0] = float("nan")
    (failed,) = engine.generate(make_prompts(250, [3]), SamplingParams(max_new_tokens=2))
    assert isinstance(failed, FailedSample)
    assert re.search(r"prompt/0: token 0 .* has rollout log-prob nan", failed.reason)
    model_chunks[0].config.moe_expert_capacity_factor = 1.0
    with pytest.raises(ValueError, match="moe_expert_capacity_factor"):
        EmbeddedEngine(model_chunks, 250)


def test_what_cannot_be_served_is_refused(ranks):
    ranks(1).run(_what_cannot_be_served)
