#!/usr/bin/env python3
"""DPPO in a Megatron loop of ``pretrain_gpt.py``'s shape: what changes is the loss function, nothing else.

Everything is set up through megatron.core alone: groups, model, optimizer, schedule. Of this package two things are used: the
loss, and (without a GPU) what lets megatron.core run on CPU tensors. The model is small and random and the rollouts are made
up, so that it runs anywhere in seconds.

    torchrun --nproc-per-node 2 examples/dppo_in_megatron_loop.py        # tensor parallelism over all processes
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_dppo import DPPOConfig, vocab_parallel_policy_stats
from megatron_dppo.compat.megatron_on_cpu import enable_megatron_on_cpu
from megatron_dppo.integrations.megatron_lm import make_loss_func

enable_megatron_on_cpu()  # does nothing where there is a GPU

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

BATCH, LENGTH, VOCAB, PADDED = 8, 16, 1000, 1024
CONFIG = DPPOConfig(divergence="binary_tv", delta_low=0.001, delta_high=0.001)


def initialize_megatron() -> torch.device:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    return device


def model_provider(device: torch.device) -> DistributedDataParallel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=128,
        tensor_model_parallel_size=dist.get_world_size(),
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=device.type == "cpu",
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,  # gradients are divided once, by the tokens of all micro-batches and ranks
        finalize_model_grads_func=finalize_model_grads,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=PADDED,
        max_sequence_length=LENGTH,
        parallel_output=True,  # logits stay sharded over the vocabulary
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).to(device)
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def make_rollouts(model: DistributedDataParallel, device: torch.device) -> dict[str, torch.Tensor]:
    """[b, s] fields. A serving engine returns ``rollout_log_probs`` with its tokens; here the same weights stand in."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator).to(device)
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "position_ids": torch.arange(LENGTH, device=device).expand(BATCH, LENGTH),
        "target": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(BATCH, LENGTH, dtype=torch.bool, device=device),
        "advantages": torch.randn(BATCH, 1, generator=generator).expand(BATCH, LENGTH).contiguous().to(device),
    }
    with torch.no_grad():
        logits = model(batch["tokens"], batch["position_ids"], causal_mask(device))
    group = parallel_state.get_tensor_model_parallel_group()
    batch["rollout_log_probs"] = vocab_parallel_policy_stats(
        logits, batch["target"], vocab_size=VOCAB, tp_group=group
    ).log_prob
    return batch


def causal_mask(device: torch.device) -> torch.Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).triu(1)[None, None]


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    logits = model(batch["tokens"], batch["position_ids"], causal_mask(batch["tokens"].device))  # [b, s, V/TP]
    loss_func = make_loss_func(
        CONFIG,
        batch,
        vocab_size=VOCAB,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        inplace_backward=True,  # nothing else needs these logits
        backward_scale=1.0,  # calculate_per_token_loss, and no loss scaling: their gradient can be made in forward
    )
    return logits, loss_func


def main() -> None:
    device = initialize_megatron()
    model = model_provider(device)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2), [model])
    batch = make_rollouts(model, device)
    halves = [{name: values[part::2] for name, values in batch.items()} for part in (0, 1)]
    for step in range(10):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(halves),
            model=model,
            num_microbatches=len(halves),
            seq_length=LENGTH,
            micro_batch_size=BATCH // len(halves),
            forward_only=False,
        )
        optimizer.step()
        if dist.get_rank() == 0:
            loss, masked = (sum(r[name] for r in reports) for name in ("loss", "dppo/mask_fraction"))
            print(f"step {step}  loss {loss[0] / loss[1]:+.4f}  masked {masked[0] / masked[1]:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
