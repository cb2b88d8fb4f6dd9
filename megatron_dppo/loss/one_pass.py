"""The loss from logits with its gradient written over them in forward, where that can be and pays."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_dppo.loss.aggregation import Aggregation
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.fused_objective import objective_of, rule_of
from megatron_dppo.loss.inputs import FlatTokens
from megatron_dppo.loss.objective import TokenObjective
from megatron_dppo.ops.arguments import VocabShard
from megatron_dppo.ops.backend import Backend
from megatron_dppo.ops.gradient_over_logits import gradient_over_logits
from megatron_dppo.ops.logits_route import takes_one_pass


def in_one_pass(
    config: DPPOConfig,
    logits: torch.Tensor,
    tokens: FlatTokens,
    aggregation: Aggregation,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    backward_scale: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor, TokenObjective] | None:
    """Decide about the tokens of a policy gradient alone, and overwrite ``logits`` [..., V] with the gradient of the loss.

    Returns:
        scalar 0 with that gradient, [N] log-probs without gradient, the objective. None, with nothing done: two passes are
        needed (a sharded vocabulary, an exact divergence), or better (``ops/logits_route.py``).
    """
    is_sharded = tp_group is not None and dist.get_world_size(tp_group) > 1
    if is_sharded or config.needs_rollout_logits or not takes_one_pass(logits, vocab_size, backend):
        return None
    # Logits that are too narrow are the same error in both ways.
    VocabShard.locate(logits.shape[-1], vocab_size, tp_group)
    zero, stats = gradient_over_logits(
        logits,
        target=tokens.target,
        rollout_log_probs=tokens.rollout_log_probs,
        advantages=tokens.advantages,
        mask=tokens.mask,
        topk_ids=tokens.topk_ids if config.needs_topk else None,
        topk_log_probs=tokens.topk_log_probs if config.needs_topk else None,
        token_weights=aggregation.token_weights,
        rule=rule_of(config),
        temperature=config.temperature,
        vocab_size=vocab_size,
        backward_scale=backward_scale,
        backend=backend,
    )
    return zero, stats.log_prob, objective_of(backend)(config, tokens, stats, None, vocab_size)
