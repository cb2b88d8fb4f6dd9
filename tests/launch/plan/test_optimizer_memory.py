"""What rounded moments and an optimizer on the host take, and what they save, in a plan."""

from __future__ import annotations

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.plan.hardware import GPUS, Assumptions
from megatron_dppo.launch.plan.plan import Plan, make_plan
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.training.config.load import load_config
from tests.launch.plan.recipes import MOE, QUICKSTART

BF16 = ["model.dtype=bf16", "parallel.use_distributed_optimizer=true", "model.backend=te"]
BETA2 = ["train.optimizer.adam_beta2=0.95"]


def _plan(*overrides: str) -> Plan:
    config = load_config(QUICKSTART, [*BF16, *BETA2, *overrides])
    return make_plan(config, load_hf_config(MOE), world_size=8, gpus_per_node=8, gpu=GPUS["h100"], assume=Assumptions())


def _optimizer(plan: Plan) -> tuple[int, int, int]:
    (stage,) = plan.stages
    shares = (stage.kept.dense, stage.kept.experts)
    return sum(s.optimizer for s in shares), sum(s.updated for s in shares), sum(s.on_host for s in shares)


def test_bytes_and_seconds_of_how_the_optimizer_keeps_its_state() -> None:
    plain, rounded, half = (
        _plan(),
        _plan("train.optimizer_memory.first_moment=bf16", "train.optimizer_memory.second_moment=bf16"),
        _plan("train.optimizer_memory.offload_fraction=0.5"),
    )
    kept, updated, on_host = _optimizer(plain)
    assert (kept, on_host) == (12 * updated, 0)
    assert _optimizer(rounded) == (8 * updated, updated, 0)
    assert _optimizer(half) == (
        pytest.approx(6 * updated, abs=2),
        updated,
        pytest.approx(8 * updated, abs=2),
    )  # and gradients
    assert rounded.step.phases["optimizer"] < plain.step.phases["optimizer"] < half.step.phases["optimizer"]


def test_what_a_run_would_refuse_on_its_gpus_is_refused_here_too() -> None:
    with pytest.raises(ConfigError, match=r"adam_beta2=0\.999"):
        _plan("train.optimizer_memory.second_moment=bf16", "train.optimizer.adam_beta2=0.999")
    with pytest.raises(ConfigError, match=r"needs GPUs, model\.dtype=bf16 and"):
        _plan("train.optimizer_memory.offload_fraction=1", "parallel.use_distributed_optimizer=false")
