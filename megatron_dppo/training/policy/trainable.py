"""The policy as the trainer holds it: wrapped for data parallelism, with its optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from transformers import PretrainedConfig

from megatron_dppo.distributed.parallel_config import ParallelConfig
from megatron_dppo.models.build import build_policy
from megatron_dppo.models.flops import PolicyFlops
from megatron_dppo.models.hf.config import is_moe
from megatron_dppo.models.kernels import accumulate_in_main_grad, choose_kernels
from megatron_dppo.models.sharding import unwrapped
from megatron_dppo.training.config.model_overrides import checked_overrides
from megatron_dppo.training.config.optimizer_memory import OptimizerMemoryConfig
from megatron_dppo.training.config.schema import MODEL_DTYPES, AdamConfig, ModelConfig
from megatron_dppo.training.data.micro_batch import MicroBatch
from megatron_dppo.training.metrics.work_clock import WorkClock


@dataclass
class OptimizerState:
    """Megatron's optimizer and the schedule that drives its learning rate."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def lr(self) -> float:
        """The learning rate of the next optimizer step."""
        return float(self.optimizer.param_groups[0]["lr"])


@dataclass
class TrainablePolicy:
    """Model chunks of this rank (one per local pipeline stage), ready for Megatron's forward-backward schedules.

    Attributes:
        chunks: DistributedDataParallel-wrapped chunks; main gradients are fp32 and summed over data-parallel ranks (with
            the distributed optimizer each rank has the sum of its part only).
        hf_config: the configuration the policy was built from; its vocab_size is the true one.
        dtype: of parameters and activations.
        uses_distributed_optimizer: gradients are reduce-scattered, and the optimizer's state is sharded over the
            data-parallel ranks.
        forward_backward: this rank's own work in optimizer steps, until it waits for other replicas' gradients.
    """

    chunks: list[DistributedDataParallel]
    hf_config: PretrainedConfig
    dtype: torch.dtype
    uses_distributed_optimizer: bool = False
    forward_backward: WorkClock = field(default_factory=WorkClock)

    @property
    def transformer_config(self) -> Any:
        """Megatron's TransformerConfig of the policy."""
        return self.chunks[0].config

    @property
    def device(self) -> torch.device:
        """Of all parameters."""
        return next(self.chunks[0].parameters()).device

    def on_device(self, batch: MicroBatch) -> MicroBatch:
        """The micro-batch where the policy computes, with the bounds of packed sequences where the policy reads them."""
        return batch.to(self.device, core_reads_bounds_on_device=self.transformer_config.apply_rope_fusion)

    def gather_weights(self) -> None:
        """Have all weights on every rank, which the last optimizer step may have left to the next forward pass. Collective.

        To be called before anybody but a forward pass of the chunks reads them.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    @property
    def fp32_head(self) -> bool:
        """Whether 16-bit hidden states get fp32 logits."""
        return bool(unwrapped(self.chunks)[0].fp32_head)

    @property
    def vocab_size(self) -> int:
        """The true vocabulary size, without Megatron's padding."""
        return int(self.hf_config.vocab_size)

    @property
    def flops(self) -> PolicyFlops:
        """What a forward pass takes."""
        return PolicyFlops.of(self.hf_config)


def build_chunks(
    model: ModelConfig, parallel: ParallelConfig, hf_config: PretrainedConfig, device: torch.device
) -> list[GPTModel]:
    """This rank's part of the policy, without weights: see ``build_policy``."""
    kernels = choose_kernels(model.backend, device.type)
    return build_policy(
        hf_config,
        parallel,
        MODEL_DTYPES[model.dtype],
        device,
        fp32_head=model.fp32_head,
        backend=model.backend,
        **model.recompute.transformer_fields(),
        **checked_overrides(model.overrides, kernels.transformer_engine, is_moe(hf_config)),
    )


def wrap_for_training(
    model_chunks: Sequence[torch.nn.Module],
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    parallel: ParallelConfig | None = None,
) -> TrainablePolicy:
    """Wrap built chunks for mixed precision (bf16 parameters, fp32 gradients) and data parallelism.

    ``parallel``: the layout that they were built in. None: one without a distributed optimizer, that overlaps nothing.
    """
    parallel = parallel or ParallelConfig()
    config: Any = model_chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_size,
    )
    chunks = [
        DistributedDataParallel(
            config,
            ddp_config,
            Float16Module(config, chunk) if dtype is torch.bfloat16 else chunk,
            # Of the later chunks of a stage all is reduced at once, while another chunk computes.
            disable_bucketing=parallel.overlap_grad_reduce and index > 0,
        )
        for index, chunk in enumerate(model_chunks)
    ]
    if parallel.overlap_grad_reduce:  # within, micro-batches but the last only add up
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    for chunk in chunks:
        chunk.broadcast_params()
    accumulate_in_main_grad(chunks)
    policy = TrainablePolicy(chunks, hf_config, dtype, parallel.use_distributed_optimizer)

    def reduce_gradients(*args: Any, **kwargs: Any) -> None:
        policy.forward_backward.stop()
        finalize_model_grads(*args, **kwargs)

    config.finalize_model_grads_func = reduce_gradients
    return policy


def build_optimizer(
    policy: TrainablePolicy, adam: AdamConfig, total_steps: int, memory: OptimizerMemoryConfig | None = None
) -> OptimizerState:
    """A fresh optimizer and schedule over the policy's parameters; the schedule is in optimizer steps.

    ``memory``: how its state is kept. None: as the defaults say.
    """
    bf16 = policy.dtype is torch.bfloat16
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=adam.lr,
            min_lr=adam.min_lr,
            weight_decay=adam.weight_decay,
            adam_beta1=adam.adam_beta1,
            adam_beta2=adam.adam_beta2,
            adam_eps=adam.adam_eps,
            clip_grad=adam.clip_grad,
            bf16=bf16,
            params_dtype=policy.dtype,
            use_distributed_optimizer=policy.uses_distributed_optimizer,
            overlap_param_gather=policy.chunks[0].ddp_config.overlap_param_gather,
            **(memory or OptimizerMemoryConfig()).optimizer_fields(),
        ),
        policy.chunks,
        use_gloo_process_groups=False,
    )
    policy.transformer_config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=adam.lr,
        min_lr=adam.min_lr,
        lr_warmup_steps=adam.lr_warmup_steps,
        lr_decay_steps=max(total_steps, adam.lr_warmup_steps + 1),
        lr_decay_style=adam.lr_decay_style,
        start_wd=adam.weight_decay,
        end_wd=adam.weight_decay,
        wd_incr_steps=max(total_steps, 1),
        wd_incr_style="constant",
    )
    return OptimizerState(optimizer, scheduler)
