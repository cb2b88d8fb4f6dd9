"""Log-probs of response tokens, from what the policy's last stage returned."""

from __future__ import annotations

import torch

from megatron_dppo.models.policy_head import PolicyHead
from megatron_dppo.ops.fused_linear import fused_linear_policy_stats
from megatron_dppo.ops.policy_stats import vocab_parallel_policy_stats
from megatron_dppo.ops.tile_tree import deterministic_choice
from megatron_dppo.training.config.schema import TrainConfig
from megatron_dppo.training.data.micro_batch import MicroBatch
from megatron_dppo.training.policy.trainable import TrainablePolicy


def response_log_probs(
    policy: TrainablePolicy, train: TrainConfig, batch: MicroBatch, output: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """[n] fp32 log-probs of the micro-batch's response tokens, with gradient.

    Args:
        policy: its last chunk gave ``output``.
        train: which way to compute: with or without logits, which kernels.
        batch: what was computed.
        output: hidden states, from a forward within ``hidden_states_only``.
        temperature: divides the logits.
    """
    head, deterministic = PolicyHead(policy.chunks[-1]), deterministic_choice(train.deterministic)
    hidden_nh = head.response_hidden(output, batch.rows, batch.shape)
    if train.fused_linear:
        return fused_linear_policy_stats(
            hidden_nh,
            head.weight,
            batch.target,
            temperature=temperature,
            vocab_size=policy.vocab_size,
            tp_group=head.tp_group,
            reduce_hidden_grad=False,  # the head does
            accumulate_into_main_grad=True,
            fp32_logits=head.fp32_logits,
            backend=train.kernel_backend,
            deterministic=deterministic,
            checks="off",  # the loss checks the same targets
        ).log_prob
    return vocab_parallel_policy_stats(
        head.logits(hidden_nh, deterministic),
        batch.target,
        temperature=temperature,
        vocab_size=policy.vocab_size,
        tp_group=head.tp_group,
        inplace_backward=True,
        backend=train.kernel_backend,
        deterministic=deterministic,
        checks="off",
    ).log_prob
