"""What closes how much of the gap between two sides: the policy is computed again with one thing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_dppo.launch.doctor.mismatch.comparison import pair
from megatron_dppo.launch.doctor.mismatch.definition import frequencies
from megatron_dppo.launch.doctor.mismatch.sides import Side, Tokens, policy_side

FP32_HEAD, REPLAY, FP32, ROPE, NORM = (
    "fp32 head",
    "routing replay",
    "dtype fp32",
    "rope of the config",
    "norm of the config",
)


@dataclass(frozen=True)
class Effect:
    """Of one switch on the policy.

    Attributes:
        switch: what was changed.
        gap: mean abs(log ratio) to the other side with it.
        closed: share of the gap without it that is gone; negative: the gap is wider.
    """

    switch: str
    gap: float
    closed: float


def effects(
    model: torch.nn.Module,
    in_fp32: Callable[[], torch.nn.Module] | None,
    other: Side,
    sequences: Sequence[Tokens],
) -> list[Effect]:
    """Every switch that can be tried.

    Args:
        model: the policy.
        in_fp32: loads it in fp32; None: it is.
        other: side that the policy is compared with.
        sequences: with experts, where they were recorded.
    """
    before = pair(other, policy_side(model, sequences)[0]).mean

    def effect(switch: str, side: Side) -> Effect:
        gap = pair(other, side).mean
        return Effect(switch, gap, 1 - gap / before if before else 0.0)

    found, config = [], model.hf_config
    if in_fp32 is not None:
        with _set(model, "fp32_head", True):
            found.append(effect(FP32_HEAD, policy_side(model, sequences)[0]))
    if all(tokens.experts is not None for tokens in sequences):
        found.append(effect(REPLAY, policy_side(model, sequences, replay=True)[0]))
    if in_fp32 is not None:
        found.append(effect(FP32, policy_side(in_fp32(), sequences)[0]))
    for switch, settings in ((ROPE, rope_of), (NORM, norm_of)):
        with settings(model, config):
            found.append(effect(switch, policy_side(model, sequences)[0]))
    return found


@contextmanager
def rope_of(model: Any, config: PretrainedConfig) -> Iterator[None]:
    """Within: the policy's positions turn by the config's angles."""
    rotary = model.rotary_pos_emb
    right = frequencies(config, rotary.inv_freq.device).to(rotary.inv_freq.dtype)
    cached = type(rotary).forward
    with _set(rotary, "inv_freq", right), ExitStack() as undo:
        if hasattr(cached, "cache_clear"):  # core keeps the angles of every length
            cached.cache_clear()
            undo.callback(cached.cache_clear)
        yield


@contextmanager
def norm_of(model: torch.nn.Module, config: PretrainedConfig) -> Iterator[None]:
    """Within: every norm of the policy has the config's epsilon."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(getattr(module, "eps", None), float):
                stack.enter_context(_set(module, "eps", float(config.rms_norm_eps)))
        yield


@contextmanager
def _set(target: torch.nn.Module, name: str, value: object) -> Iterator[None]:
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)
