"""DPPO in slime, as a custom loss function. In a module of your own, ``dppo_loss.py``::

    from megatron_dppo import DPPOConfig
    from megatron_dppo.integrations.slime import make_loss_function
    loss_function = make_loss_function(DPPOConfig(divergence="binary_tv"))

    python train.py --loss-type custom_loss --custom-loss-function-path dppo_loss.loss_function --use-rollout-logprobs ...

slime asks its engine for log-probs always. ``--use-rollout-logprobs`` spares the forward pass that would recompute them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from megatron_dppo.integrations.framework import framework_module, require_installed
from megatron_dppo.integrations.packed_responses import LossFunction, Rank
from megatron_dppo.integrations.packed_responses import make_loss_function as make_packed_loss_function
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.token_losses import TokenLosses

RECORDED_VERSIONS = ("0.3.1",)


def make_loss_function(
    config: DPPOConfig,
    *,
    backend: str = "auto",
    checks: Literal["now", "off"] = "now",
    collect: Callable[[TokenLosses], None] | None = None,
) -> LossFunction:
    """A function for ``--custom-loss-function-path``.

    Args:
        config: what is optimised; normalisation, temperature and entropy are options of slime's own.
        backend, checks: as for ``DPPOLoss``.
        collect: called with the whole of every micro-batch, whose metrics add up exactly.

    Raises:
        MissingDependencyError: slime is not installed.
        ConfigError: its version is not one whose call was recorded, or ``config`` asks for what is not read here.
    """
    require_installed("slime", RECORDED_VERSIONS)
    return make_packed_loss_function("slime", config, _rank, backend, checks, collect)


def _rank() -> Rank:
    parallel_state = framework_module("megatron.core.parallel_state")
    return Rank(
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_group(),
    )
