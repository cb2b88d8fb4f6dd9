"""Floating-point operations of a policy, from its shapes: what a sequence costs to train on, and what a GPU made of its time.

Counted are the products of matrices, two operations for each multiply-add: of each layer the projections, attention and the
experts that a token goes to, and the output layer. Attention is causal: position t looks at t + 1 others. What is left out
(norms, activations, the router) is below one per cent for any policy worth training.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_dppo.models.hf.config import architecture, is_moe

_FORWARD_AND_BACKWARD = 3  # the gradient of a product is two products of its size


@dataclass(frozen=True)
class PolicyFlops:
    """Operations of one forward pass.

    Attributes:
        per_token: of a token, wherever it stands.
        per_pair: of a token that attends to another, or itself.
    """

    per_token: float
    per_pair: float

    @classmethod
    def of(cls, hf_config: PretrainedConfig) -> PolicyFlops:
        """Of this policy, its embedding left out (a lookup) and its output layer at every position."""
        fields = architecture(hf_config)
        hidden, layers = fields["hidden_size"], fields["num_hidden_layers"]
        query_width = fields["num_attention_heads"] * fields["head_dim"]
        key_value_width = fields["num_key_value_heads"] * fields["head_dim"]
        if is_moe(hf_config):
            intermediate = fields["num_experts_per_tok"] * fields["moe_intermediate_size"]
        else:
            intermediate = fields["intermediate_size"]
        weights_per_layer = hidden * (2 * query_width + 2 * key_value_width + 3 * intermediate)
        return cls(
            per_token=2.0 * (layers * weights_per_layer + hidden * fields["vocab_size"]),
            per_pair=4.0 * layers * query_width,  # the score, and its share of the values
        )

    def training(self, length: int) -> float:
        """Forward and backward of one sequence of ``length`` tokens, nothing recomputed."""
        return _FORWARD_AND_BACKWARD * (self.per_token * length + self.per_pair * length * (length + 1) / 2)
