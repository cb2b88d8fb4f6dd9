"""Memory of the servers: weights, and what is left for their KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.plan.hardware import Assumptions, Gpu
from megatron_dppo.models.hf.config import architecture, is_moe
from megatron_dppo.models.hf.names import hf_shapes, parameter_names
from megatron_dppo.training.config.schema import MODEL_DTYPES, Config

_FRACTION_FLAG = "--mem-fraction-static"


@dataclass(frozen=True)
class ServerPlan:
    """One server; bytes on each of its ranks.

    Attributes:
        count: servers in all.
        ranks: of each.
        dense, experts: bytes of weights of either kind.
        kv_bytes: of a token in the KV cache.
        room: that the KV cache may have; below 0: the weights alone are too large.
        fraction: of the GPU's memory for weights and cache.
        from_recipe: whether the recipe says so, or it is assumed.
    """

    count: int
    ranks: int
    dense: float
    experts: float
    kv_bytes: float
    room: float
    fraction: float
    from_recipe: bool

    @property
    def weights(self) -> float:
        """Bytes of all weights."""
        return self.dense + self.experts

    @property
    def tokens(self) -> int:
        """Of all sequences that are being generated, at most."""
        return max(0, int(self.room / self.kv_bytes))

    def sequences(self, tokens: float) -> int:
        """Of so many tokens each, at once."""
        return int(self.tokens / tokens)


def planned_servers(
    config: Config, hf_config: PretrainedConfig, gpu: Gpu, assume: Assumptions, beside: float = 0.0
) -> ServerPlan | None:
    """The servers of a run; None with the embedded engine.

    Args:
        config: of the run.
        hf_config: of the policy.
        gpu: of the servers.
        assume: what is assumed.
        beside: bytes that the trainer leaves on each of their GPUs while they generate (colocated).
    """
    if config.rollout.engine != "sglang":
        return None
    sglang = config.rollout.sglang
    dtype = getattr(torch, sglang.dtype) if sglang.dtype else MODEL_DTYPES[config.model.dtype]
    ranks = sglang.tensor_model_parallel_size
    dense, experts = (count * dtype.itemsize / ranks for count in parameters_of(hf_config))
    given = _given_fraction(sglang.extra_args)
    fraction = assume.server_fraction if given is None else given
    allowed = min(fraction * gpu.memory, gpu.memory - assume.memory_reserve - beside)
    return ServerPlan(
        count=len(sglang.urls) or sglang.num_servers,
        ranks=ranks,
        dense=dense,
        experts=experts,
        kv_bytes=kv_bytes_per_token(hf_config, ranks, dtype.itemsize),
        room=allowed - dense - experts,
        fraction=fraction,
        from_recipe=given is not None,
    )


def parameters_of(hf_config: PretrainedConfig) -> tuple[int, int]:
    """How many the whole policy has: (dense ones, of experts)."""
    counts = {True: 0, False: 0}
    for name in parameter_names(hf_config):
        counts[".experts." in name] += sum(math.prod(shape) for shape in hf_shapes(name, hf_config))
    return counts[False], counts[True]


def kv_bytes_per_token(hf_config: PretrainedConfig, ranks: int, itemsize: int) -> float:
    """Of a token's keys and values in all layers, on each of ``ranks``; heads that are fewer than ranks are repeated."""
    fields = architecture(hf_config)
    heads = max(1.0, fields["num_key_value_heads"] / ranks)
    return 2.0 * fields["num_hidden_layers"] * heads * fields["head_dim"] * itemsize


def touched_share(hf_config: PretrainedConfig, tokens: float) -> float:
    """Of the experts' weights, that a step of ``tokens`` tokens reads, if each goes to experts of its own choice."""
    if not is_moe(hf_config):
        return 1.0
    fields = architecture(hf_config)
    return float(1 - (1 - fields["num_experts_per_tok"] / fields["num_experts"]) ** tokens)


def _given_fraction(extra_args: list[str]) -> float | None:
    arguments = [part for argument in extra_args for part in argument.split("=", 1)]
    if _FRACTION_FLAG not in arguments:
        return None
    at = arguments.index(_FRACTION_FLAG) + 1
    try:
        fraction = float(arguments[at])
    except (IndexError, ValueError) as error:
        raise ConfigError(f"rollout.sglang.extra_args: {_FRACTION_FLAG} is a number between 0 and 1") from error
    if not 0 < fraction < 1:
        raise ConfigError(f"rollout.sglang.extra_args: {_FRACTION_FLAG} is between 0 and 1, not {fraction}")
    return fraction
