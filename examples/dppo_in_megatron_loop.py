#!/usr/bin/env python3
"""DPPO in a Megatron loop that already exists: what changes is the loss function, nothing else.

Everything up to ``forward_step`` is what such a loop has anyway (here: a random two-layer Qwen3 and made-up rollouts, so that
it runs anywhere in seconds).

    torchrun --nproc-per-node 2 examples/dppo_in_megatron_loop.py        # tensor parallelism over all processes
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dppo import DPPOConfig, vocab_parallel_policy_stats
from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.distributed.ranks import choose_device, joined_ranks
from megatron_dppo.integrations.megatron_lm import make_loss_func
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.training.config.schema import AdamConfig
from megatron_dppo.training.policy.trainable import build_optimizer, wrap_for_training

BATCH, LENGTH, VOCAB = 8, 16, 1000


def existing_training_setup(device: torch.device):
    """A policy, its optimizer and a batch of rollouts [b, s] with rewards already turned into advantages."""
    parallel = ParallelConfig(tensor_model_parallel_size=dist.get_world_size())
    initialize_model_parallel(parallel, seed=0)
    hf_config = load_hf_config(
        {
            "model_type": "qwen3",
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
        }
    )
    chunks = build_policy(hf_config, parallel, torch.float32, device)
    initialize_randomly(chunks, seed=0)
    policy = wrap_for_training(chunks, hf_config, torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator).to(device)
    batch = {
        "tokens": tokens[:, :-1],
        "position_ids": torch.arange(LENGTH, device=device).expand(BATCH, LENGTH),
        "target": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(BATCH, LENGTH, dtype=torch.bool, device=device),
        "advantages": torch.randn(BATCH, 1, generator=generator).expand(BATCH, LENGTH).contiguous().to(device),
    }
    return policy, build_optimizer(policy, AdamConfig(lr=1e-2), total_steps=10), batch


def rollout_log_probs(policy, batch) -> torch.Tensor:
    """What the serving engine would have returned with the tokens; here the same weights stand in for it."""
    with torch.no_grad():
        logits = policy.chunks[0](batch["tokens"], batch["position_ids"], None)
        return vocab_parallel_policy_stats(
            logits, batch["target"], vocab_size=VOCAB, tp_group=dist.group.WORLD
        ).log_prob


def main() -> None:
    device = choose_device("auto")
    with joined_ranks(device):
        policy, optimizer_state, batch = existing_training_setup(device)
        batch["rollout_log_probs"] = rollout_log_probs(policy, batch)
        config = DPPOConfig(divergence="binary_tv", delta_low=0.001, delta_high=0.001)

        def forward_step(data_iterator, model):
            micro_batch = next(data_iterator)
            logits = model(micro_batch["tokens"], micro_batch["position_ids"], None)  # [b, s, V/TP]
            return logits, make_loss_func(
                config,
                micro_batch,
                vocab_size=VOCAB,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                inplace_backward=True,  # nothing else needs these logits
            )

        from megatron.core.pipeline_parallel import get_forward_backward_func

        for step in range(10):
            policy.chunks[0].zero_grad_buffer()
            optimizer_state.optimizer.zero_grad()
            (report,) = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter([batch]),
                model=policy.chunks[0],
                num_microbatches=1,
                seq_length=LENGTH,
                micro_batch_size=BATCH,
                forward_only=False,
            )
            optimizer_state.optimizer.step()
            if dist.get_rank() == 0:
                loss, masked = (float(pair[0] / pair[1]) for pair in (report["loss"], report["dppo/mask_fraction"]))
                print(f"step {step}  loss {loss:+.4f}  masked {masked:.1%}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
