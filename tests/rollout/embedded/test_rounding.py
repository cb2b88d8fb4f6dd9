"""With rounded weights the engine is, bit for bit, the engine of a policy that has those weights; the trainer's stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from megatron.core import parallel_state

from megatron_dppo.distributed.layout import ParallelConfig
from megatron_dppo.errors import ConfigError
from megatron_dppo.rollout.embedded.config import EmbeddedConfig
from megatron_dppo.rollout.embedded.engine import EmbeddedEngine
from megatron_dppo.rollout.embedded.rounding import ROUNDINGS, round_rows_to_fp8, round_rows_to_int8
from megatron_dppo.rollout.sample import Sample, SamplingParams
from tests.rollout.embedded.embedded_subject import build_tiny_policy, load_from
from tests.rollout.engine_contract import make_prompts

ROUTER = ".mlp.gate.weight"  # Hugging Face's name
SAMPLING = SamplingParams(max_new_tokens=8, samples_per_prompt=4, topk_log_probs=3, return_routed_experts=True, seed=5)


def _rounded_on_disk(hf_model: torch.nn.Module, choose: Callable[[str], str]) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            if (rounding := choose(name)) != "none":
                parameter.copy_(ROUNDINGS[rounding](parameter))
    return hf_model


def _drawn(samples: list[Sample]) -> list[tuple]:
    return [
        (s.response_ids, s.rollout_log_probs, s.topk_log_probs.tolist(), s.routed_experts.tolist()) for s in samples
    ]


def _is_the_engine_of_the_rounded_policy(weight_rounding: str, router_rounding: str) -> None:
    prompts = make_prompts(250, [4, 7])
    chunks, hf_model = build_tiny_policy("qwen3_moe", ParallelConfig())
    before = {name: parameter.clone() for name, parameter in chunks[0].named_parameters()}
    config = EmbeddedConfig(weight_rounding=weight_rounding, router_rounding=router_rounding)
    rounded = _drawn(EmbeddedEngine(chunks, 250, config=config).generate(prompts, SAMPLING))
    assert all(torch.equal(before[name], parameter) for name, parameter in chunks[0].named_parameters())
    assert rounded != _drawn(EmbeddedEngine(chunks, 250).generate(prompts, SAMPLING))
    load_from(
        _rounded_on_disk(hf_model, lambda name: router_rounding if name.endswith(ROUTER) else weight_rounding), chunks
    )
    assert rounded == _drawn(EmbeddedEngine(chunks, 250).generate(prompts, SAMPLING))
    parallel_state.destroy_model_parallel()


def _every_rounding_is_exact() -> None:
    for rounding in (("bf16", "none"), ("fp8_e4m3", "none"), ("int8", "bf16"), ("none", "int8")):
        _is_the_engine_of_the_rounded_policy(*rounding)


def test_what_is_drawn_and_recorded_is_that_of_a_policy_with_rounded_weights(ranks):
    ranks(1).run(_every_rounding_is_exact)


def _an_error_leaves_the_weights() -> None:
    (model,), _ = build_tiny_policy("qwen3", ParallelConfig())
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    engine = EmbeddedEngine([model], 250, config=EmbeddedConfig(weight_rounding="int8"))
    model.output_layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(make_prompts(250, [3]), SamplingParams(max_new_tokens=2))
    assert storage == [parameter.data_ptr() for parameter in model.parameters()]


def test_an_error_amid_a_generation_leaves_the_weights_in_their_place(ranks):
    ranks(1).run(_an_error_leaves_the_weights)


def test_rows_are_rounded_on_their_own_scale_and_vectors_not_by_rows():
    matrix = torch.tensor([[1.0, -0.5, 0.013], [1e-3, 3e-6, -1e-3], [0.0, 0.0, 0.0]])
    int8, fp8 = round_rows_to_int8(matrix), round_rows_to_fp8(matrix)
    scale = torch.tensor([[1.0], [1e-3], [0.0]])
    # int8: half a step of the row's largest / 127. fp8 has 3 bits of mantissa: 2^-4 of each number, above its subnormals.
    assert bool(((int8 - matrix).abs() <= scale / 254 * (1 + 1e-6)).all())
    assert bool(((fp8 - matrix).abs() <= torch.maximum(matrix.abs() / 16, scale / 448 * 2**-10) * (1 + 1e-6)).all())
    assert not torch.equal(int8, matrix)
    assert torch.equal(round_rows_to_fp8(matrix[0]), matrix[0])


def test_a_rounding_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="router_rounding must be one of none, bf16, fp8_e4m3, int8, not 'fp4'"):
        EmbeddedConfig(router_rounding="fp4")
