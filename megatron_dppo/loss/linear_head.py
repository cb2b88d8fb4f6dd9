"""The loss from what makes the logits, instead of the logits: hidden states and the output layer's weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch

from megatron_dppo.loss.aggregation import Aggregation
from megatron_dppo.loss.inputs import FlatTokens
from megatron_dppo.loss.objective import TokenObjective
from megatron_dppo.ops.arguments import RowSelection
from megatron_dppo.ops.fused_linear import fused_linear_policy_stats
from megatron_dppo.ops.gradient_in_forward import zero_with_policy_gradient
from megatron_dppo.ops.linear_call import CHUNK_BYTES
from megatron_dppo.ops.linear_route import rows_of_a_block
from megatron_dppo.ops.policy_stats import PolicyStats


@dataclass(frozen=True)
class LinearHead:
    """In place of logits: what the output layer would make them of. They then never exist as a whole.

    Attributes:
        hidden: [..., h]; with ``sequence_parallel`` this rank's [s/TP, ..., h] of tokens [s, ...].
        weight: [V/TP, h] this rank's rows of the output layer, in the dtype of ``hidden``.
        sequence_parallel: ``hidden`` is sharded along its first dimension over the tensor-parallel group.
        reduce_hidden_grad: sum the gradient of ``hidden`` over that group. False: the caller does.
        accumulate_into_main_grad: add the weight's gradient to its ``main_grad`` (see ``ops/fused_linear.py``).
        backward_scale: the number that backward will be called with on the loss, a promise: 1.0 for ``loss.backward()``, and
            for Megatron with ``calculate_per_token_loss`` and no loss scaling. With ``accumulate_into_main_grad`` it lets the
            gradient be made in forward (``ops/gradient_in_forward.py``); backward must then follow. None: not known.
        fp32_logits: do not round the logits of 16-bit hidden states to 16 bits.
        chunk_bytes: largest tile of logits; None: what suits the device (``ops/linear_route.py``).
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    _: KW_ONLY
    sequence_parallel: bool = False
    reduce_hidden_grad: bool = True
    accumulate_into_main_grad: bool = False
    backward_scale: float | None = None
    fp32_logits: bool = False
    chunk_bytes: int | None = None

    def policy_stats(self, target: torch.Tensor, **arguments: Any) -> PolicyStats:
        """[...] statistics with gradient, in two passes. ``arguments``: those of ``fused_linear_policy_stats``."""
        return fused_linear_policy_stats(self.hidden, self.weight, target, **self._arguments(), **arguments)

    def rows_of_a_block(self, num_tokens: int) -> int | None:
        """Tokens of a block where the gradient of a loss that is a policy gradient alone is best made in forward."""
        return rows_of_a_block(
            self.hidden,
            self.weight,
            num_tokens,
            fp32_logits=self.fp32_logits,
            accumulate_into_main_grad=self.accumulate_into_main_grad,
            backward_scale=self.backward_scale,
            chunk_bytes=self.chunk_bytes,
        )

    def policy_gradient(
        self,
        target: torch.Tensor,
        tokens: FlatTokens,
        aggregation: Aggregation,
        decide: Callable[[FlatTokens, PolicyStats], TokenObjective],
        block_rows: int,
        **arguments: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, TokenObjective]:
        """Decide about the tokens block by block, and make the gradient of the loss at once.

        Args:
            target: [...] as for ``policy_stats``.
            tokens: [N] the same tokens.
            aggregation: how the loss sums them.
            decide: the objective of some tokens, given their statistics.
            block_rows: tokens of a block.
            arguments: as for ``policy_stats``.

        Returns:
            scalar 0 with the gradient of the loss, [N] log-probs without gradient, the objective.
        """
        objectives, log_probs, places = [], [], []

        def token_gradient(stats: PolicyStats, block: Any) -> torch.Tensor:  # a slice, or [r] positions
            objective = decide(tokens.part(block), stats)
            objectives.append(objective)
            log_probs.append(stats.log_prob)
            places.append(block)
            # A token without any probability has none that an update could scale.
            coefficient = objective.coefficient.masked_fill(stats.log_prob == -torch.inf, 0.0)
            return -aggregation.weighted(coefficient, block)

        zero = zero_with_policy_gradient(
            self.hidden,
            self.weight,
            target,
            token_gradient,
            block_rows=block_rows,
            backward_scale=self.backward_scale,
            **self._arguments(),
            **arguments,
        )
        log_prob, objective = torch.cat(log_probs), TokenObjective.joined(objectives)
        if not isinstance(places[0], torch.Tensor):
            return zero, log_prob, objective
        order = RowSelection(torch.cat(places))
        objective = replace(
            objective,
            coefficient=order.spread(objective.coefficient, len(log_prob)),
            weight=order.spread(objective.weight, len(log_prob)),
            divergence=order.spread(objective.divergence, len(log_prob)),
        )
        return zero, order.spread(log_prob, len(log_prob)), objective

    def _arguments(self) -> dict[str, Any]:
        return {
            "sequence_parallel": self.sequence_parallel,
            "reduce_hidden_grad": self.reduce_hidden_grad,
            "accumulate_into_main_grad": self.accumulate_into_main_grad,
            "fp32_logits": self.fp32_logits,
            "chunk_bytes": CHUNK_BYTES if self.chunk_bytes is None else self.chunk_bytes,
        }
