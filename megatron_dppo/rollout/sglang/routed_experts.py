"""Expert choices in SGLang's answers: [prompt + T - 1, layers, experts per token] int32, as base64 text.

SGLang keeps a token's choices beside its place in the key-value cache. Tokens whose prefix was found in the cache therefore
come with the choices that made the cached keys and values, and retracted requests with those of their last computation.
The numbers are those of the checkpoint's experts, also where the server moves experts between GPUs (EPLB).
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_dppo.errors import ConfigError, RolloutError
from megatron_dppo.models.hf.config import is_moe
from megatron_dppo.rollout.sample import Prompt
from megatron_dppo.rollout.sglang.servers.server import EXPERT_CHOICES_FLAG


@dataclass(frozen=True)
class RoutingShape:
    """The facts of a model that decide what a token's choices look like."""

    layers: int
    experts: int
    experts_per_token: int

    @classmethod
    def of(cls, hf_config: PretrainedConfig) -> RoutingShape:
        """Raises ConfigError for a dense model."""
        if not is_moe(hf_config):
            raise ConfigError(
                "expert choices were asked for (routing replay), but this policy is dense: it has no experts"
            )
        return cls(hf_config.num_hidden_layers, hf_config.num_experts, hf_config.num_experts_per_tok)


def parse_routed_experts(
    meta: dict[str, Any], prompt: Prompt, response_length: int, shape: RoutingShape
) -> torch.Tensor:
    """[prompt + T - 1, layers, k] int32. Raises RolloutError if the answer does not hold choices of this shape."""
    encoded = meta.get("routed_experts")
    if not encoded:
        raise RolloutError(
            f"sample of {prompt.prompt_id}: the server returned no expert choices. A server that was not started by this "
            f"engine has to be started with {EXPERT_CHOICES_FLAG}, and be of a version that has this flag"
        )
    try:
        data = bytearray(base64.b64decode(encoded, validate=True))
    except (binascii.Error, ValueError, TypeError) as error:
        raise RolloutError(f"sample of {prompt.prompt_id}: the server's expert choices are not base64 text") from error
    tokens = len(prompt.token_ids) + response_length - 1
    expected = (tokens, shape.layers, shape.experts_per_token)
    if len(data) != 4 * tokens * shape.layers * shape.experts_per_token:
        raise RolloutError(
            f"sample of {prompt.prompt_id}: the server returned {len(data)} bytes of expert choices, expected int32 numbers "
            f"of shape {expected} (tokens of prompt and response, layers, experts per token); is it serving another model?"
        )
    experts = torch.frombuffer(data, dtype=torch.int32).view(expected)
    if int(experts.max()) >= shape.experts:
        raise RolloutError(
            f"sample of {prompt.prompt_id}: the server chose expert {int(experts.max())} of {shape.experts}; is it serving "
            "another model?"
        )
    return experts
