"""What a weight update has to know about a server, as the server itself reports it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_dppo.errors import RolloutError
from megatron_dppo.rollout.sglang.answers import reading
from megatron_dppo.rollout.sglang.parameter_layout import ServerLayout


@dataclass(frozen=True)
class ServerFacts:
    """Of one server.

    Attributes:
        url: its address.
        num_ranks: processes that receive weights.
        layout: how the model is divided among them.
    """

    url: str
    num_ranks: int
    layout: ServerLayout

    @classmethod
    def of(cls, url: str, info: dict[str, Any]) -> ServerFacts:
        """From an answer to ``/server_info``. Raises RolloutError for a layout that cannot be updated by broadcast."""
        with reading(f"{url}/server_info"):
            if info.get("pp_size", 1) != 1:
                # SGLang gives all stages the same rank in the update group (model_runner_components/weight_updater.py).
                raise RolloutError(
                    f"{url} runs with pp_size = {info['pp_size']}: SGLang cannot update such servers. Use tensor and expert"
                    " parallelism, over several nodes if need be"
                )
            tp_size = int(info["tp_size"])
            attention_groups = _attention_groups(url, info)
            attention_tp_size = tp_size // attention_groups
            layout = ServerLayout(
                tp_size=tp_size,
                device_type=str(info["device"]),
                ep_size=int(info.get("ep_size", 1)),
                attention_tp_size=attention_tp_size,
                lm_head_tp_size=attention_tp_size if info.get("enable_dp_lm_head") else tp_size,
            )
            return cls(url, tp_size, layout)


def _attention_groups(url: str, info: dict[str, Any]) -> int:
    """Under DP attention ``dp_size`` says 1: how many there are stands elsewhere."""
    if info.get("enable_dp_attention"):
        return int(info["attn_dp_size"])
    if info.get("dp_size", 1) != 1:
        raise RolloutError(
            f"{url} runs with dp_size = {info['dp_size']}: its copies of the model cannot be told apart. Start a server for"
            " each, or add --enable-dp-attention"
        )
    return 1
