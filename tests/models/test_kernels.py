"""Whose layers a policy is built with: never another's in silence; and what comes with Transformer Engine's."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo.compat.optional_dependencies import Availability
from megatron_dppo.distributed.parallel_config import ParallelConfig
from megatron_dppo.errors import ConfigError
from megatron_dppo.models.hf.config import to_transformer_config
from megatron_dppo.models.kernels import Kernels, accumulate_in_main_grad, choose_kernels
from tests.models.tiny_policies import tiny_hf_config

THERE = Availability(True, "transformer_engine 2.9")
ABSENT = Availability(False, "transformer_engine is not installed")
APEX = Availability(True, "fused_weight_gradient_mlp_cuda")
NO_APEX = Availability(False, "fused_weight_gradient_mlp_cuda is not installed")
ENGINE = Kernels(transformer_engine=True, on_cuda=True, rope_fusion=True, permute_fusion=True)
CORE_ON_CUDA = Kernels(on_cuda=True)


@pytest.mark.parametrize(
    ("backend", "device", "engine", "weight_gradient", "expected"),
    [
        ("auto", "cuda", THERE, NO_APEX, ENGINE),
        ("te", "cuda", THERE, NO_APEX, ENGINE),
        ("te", "cuda", THERE, APEX, ENGINE),  # Transformer Engine's own accumulation, not apex's
        ("local", "cuda", THERE, NO_APEX, CORE_ON_CUDA),
        ("local", "cuda", ABSENT, APEX, Kernels(on_cuda=True, core_weight_gradient_fusion=True)),
        ("auto", "cpu", THERE, APEX, Kernels()),
        ("local", "cpu", THERE, APEX, Kernels()),
        ("te", "meta", ABSENT, NO_APEX, Kernels()),  # shapes alone
    ],
)
def test_the_backend_and_the_device_decide_and_what_is_installed_does_not(
    backend: str, device: str, engine: Availability, weight_gradient: Availability, expected: Kernels
) -> None:
    assert choose_kernels(backend, device, engine, weight_gradient) == expected


@pytest.mark.parametrize(
    ("backend", "device", "engine", "message"),
    [
        ("auto", "cuda", ABSENT, "model.backend=auto, which is te on a GPU, .*is not installed.*model.backend=local"),
        ("te", "cuda", ABSENT, "model.backend=te needs .*is not installed.*model.backend=local"),
        ("te", "cpu", THERE, "do not run on a cpu.*model.backend=local"),
        ("transformer_engine", "cpu", THERE, "must be one of auto, te, local"),
    ],
)
def test_a_backend_that_cannot_be_had_is_refused_with_the_reason(
    backend: str, device: str, engine: Availability, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_kernels(backend, device, engine, NO_APEX)


def test_the_kernels_are_what_core_is_told() -> None:
    """Without a GPU core refuses the fused ones, as they are not there: its words are the proof that it reads the field."""
    hf_config = tiny_hf_config("qwen3_moe")
    config = to_transformer_config(hf_config, ParallelConfig(), torch.float32, Kernels())
    assert not config.apply_rope_fusion
    assert not config.moe_permute_fusion
    assert not config.gradient_accumulation_fusion
    assert config.use_cpu_initialization
    assert not config.moe_grouped_gemm
    on_cuda = to_transformer_config(hf_config, ParallelConfig(), torch.float32, CORE_ON_CUDA)
    assert on_cuda.bias_activation_fusion
    assert on_cuda.bias_dropout_fusion
    assert not on_cuda.use_cpu_initialization
    for kernels, refusal in (
        (Kernels(rope_fusion=True), "apply_rope_fusion is not available"),
        (Kernels(permute_fusion=True), "fused permutation is not available|cannot import name 'fused_permute'"),
    ):
        with pytest.raises((ValueError, ImportError), match=refusal):  # core 0.16 fails to find its own words
            to_transformer_config(hf_config, ParallelConfig(), torch.float32, kernels)


class _EngineLinear(torch.nn.Linear):
    """As Transformer Engine's modules are asked: by an attribute that they read in forward."""

    fuse_wgrad_accumulation = False


def test_every_module_that_can_accumulates_into_main_grad() -> None:
    model = torch.nn.Sequential(_EngineLinear(2, 2), torch.nn.Sequential(_EngineLinear(2, 2)), torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="_EngineLinear: weight, bias have no main_grad"):
        accumulate_in_main_grad([model])
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # as DistributedDataParallel does
    assert accumulate_in_main_grad([model]) == 2
    assert model[0].fuse_wgrad_accumulation
    assert model[1][0].fuse_wgrad_accumulation
    assert not hasattr(model[2], "fuse_wgrad_accumulation")
