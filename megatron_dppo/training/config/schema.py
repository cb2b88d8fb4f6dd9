"""Every option of a training run, its default and its meaning: the only place where defaults of the trainer live.

Sections that belong to a lower layer are that layer's own dataclasses (``DPPOConfig``, ``ParallelConfig``,
``EmbeddedConfig``, ``SGLangConfig``, ``TaskConfig``), so a default is never stated twice. Where the trainer has another one,
the field that holds the section says so. ``load_config`` (load.py) reads YAML into these classes; ``check_config`` (check.py)
refuses what cannot work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_dppo.distributed.parallel_config import ParallelConfig
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.rollout.embedded.config import EmbeddedConfig
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.training.config.optimizer_memory import OptimizerMemoryConfig
from megatron_dppo.training.config.recompute import RecomputeConfig

# The names of dtypes in the configuration.
MODEL_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class RunConfig:
    """Where the run lives and how it is repeated.

    Attributes:
        name: of the run's folder. None: the configuration file's name and the time of the start.
        root: the folder of run folders.
        seed: of prompts, sampling and initial weights.
        device: auto | cuda | cpu.
        resume: auto: from the last complete checkpoint, if the run folder has one | never: refuse a used folder.
        max_seconds: after so many the step ends, a checkpoint is written and the run exits with the code that asks to be
            started again; 0: no limit. Leave room for one step and one checkpoint before the job's own limit.
    """

    name: str | None = None
    root: str = "runs"
    seed: int = 1234
    device: str = "auto"
    resume: str = "auto"
    max_seconds: float = 0.0


@dataclass
class ModelConfig:
    """The policy: a Hugging Face folder with config.json, tokenizer and (unless init is random) safetensors.

    Attributes:
        path: of the folder.
        tokenizer: folder of the tokenizer. None: the model's.
        chat: use the tokenizer's chat template, if it has one.
        init: pretrained | random.
        dtype: of weights and activations: bf16 | fp32.
        fp32_head: with bf16, leave logits in fp32, in training and in the engine. Started servers get SGLang's
            ``--enable-fp32-lm-head``; others that lack it, or that have it if this is false, are refused. On by default:
            rounding the logits to bf16 shows as divergence between trainer and engine (docs/mismatch.md), and a server that
            does not fit is an error, never a silent change. Its cost is memory: the logits of a micro-batch take twice as
            much (train.fused_linear bounds them). fp32 models have fp32 logits in any case, with and without Transformer
            Engine. A run goes on with the value that it began with.
        backend: whose layers: te (Transformer Engine) | local (Megatron-core's own, with torch's attention) | auto: te on
            GPUs, local on CPUs, whatever is installed: that Transformer Engine is asked for and cannot be used is an error.
        recompute: of activations, in the backward pass.
        overrides: fields of Megatron's TransformerConfig by core's own names, of those that change how fast the same numbers
            are computed (docs/gpu_switches.md lists them, and why others are refused).
    """

    path: str = ""
    tokenizer: str | None = None
    chat: bool = True
    init: str = "pretrained"
    dtype: str = "bf16"
    fp32_head: bool = True
    backend: str = "auto"
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class AlgorithmConfig:
    """What is optimised beyond the loss itself.

    Attributes:
        loss: the loss. Its ``ratio_cap`` is 10 here, where the loss's own is none: no divergence sees a rare token whose
            ratio explodes, and one such token would own the step (docs/algorithm.md).
        advantage: mean_baseline | rloo | grpo.
        topk: K of topk_tv, topk_kl and of the predictive direction's estimators.
        anchor: what the ratio and the divergence are measured against: rollout | recomputed. The latter, the policy's own
            log-probs before the first optimizer step, is the ablation that the paper shows to collapse; it also costs one
            more forward pass.
        max_mismatch: largest mean |log pi - log mu| between policy and engine before the first optimizer step of a batch, as
            a seam that does not fit shows in it: other weights, another temperature or tokenizer. Above it nothing is learned
            and the run stops, with a checkpoint. 0: no limit.
        routing_replay: MoE policies: route every token in training as the engine routed it, so that a router that rounds
            differently does not show up as a policy that has moved.
    """

    loss: DPPOConfig = field(default_factory=lambda: DPPOConfig(ratio_cap=10.0))
    advantage: str = "mean_baseline"
    topk: int = 20
    anchor: str = "rollout"
    max_mismatch: float = 0.5
    routing_replay: bool = False


@dataclass
class RolloutConfig:
    """How responses are sampled: untruncated, at ``algorithm.loss.temperature``, under which they are scored too.

    Attributes:
        engine: embedded | sglang.
        prompts_per_step: over all data-parallel replicas.
        samples_per_prompt: responses to each prompt; they are each other's baseline.
        max_prompt_tokens: longer prompts are left out.
        max_response_tokens: responses end here.
        max_batch_size: embedded: sequences decoded at once per replica.
        log_prob_floor: a sampled token whose reported log-prob is below is a fault of the engine, as nothing so unlikely is
            ever drawn: the token is left out and counted.
        max_failed_share: of a step's samples, that may turn out unusable (an engine's fault in one, no server left for a
            replica); they are counted, named in failures.jsonl and not trained on. Above it the run stops with a checkpoint.
        exchange_timeout_s: how long ranks wait for the last one to have generated and scored its share. Every time-out within
            that time has to be shorter, and is named if it is not.
        embedded: options of the embedded engine.
        sglang: options of the sglang engine.
    """

    engine: str = "embedded"
    prompts_per_step: int = 16
    samples_per_prompt: int = 8
    max_prompt_tokens: int = 512
    max_response_tokens: int = 512
    max_batch_size: int = 256
    log_prob_floor: float = -30.0
    max_failed_share: float = 0.1
    exchange_timeout_s: float = 14400.0
    embedded: EmbeddedConfig = field(default_factory=EmbeddedConfig)
    sglang: SGLangConfig = field(default_factory=SGLangConfig)


@dataclass
class AdamConfig:
    """Adam with weight decay, learning-rate warm-up and decay, and gradient clipping by global norm.

    Attributes:
        lr: the learning rate after the warm-up.
        min_lr: that decay ends at.
        lr_warmup_steps: optimizer steps in which the learning rate rises from 0.
        lr_decay_style: constant | linear | cosine.
        weight_decay: decoupled weight decay.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_eps: added to the root of the second moment.
        clip_grad: largest global gradient norm; 0: gradients are not clipped.
    """

    lr: float = 1e-6
    min_lr: float = 0.0
    lr_warmup_steps: int = 0
    lr_decay_style: str = "constant"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class TrainConfig:
    """How much is learned from each rollout batch, and how it is computed.

    Attributes:
        steps: rollout batches.
        updates_per_rollout: optimizer steps per rollout batch; from the second on the data are off-policy.
        batching: padded: sequences of similar length, padded to the longest of each micro-batch | packed: sequences end to
            end, no padding, as many as fit a token budget. Same numbers; packed wastes nothing where lengths differ widely.
        micro_batch_size: padded: sequences per forward pass and replica.
        tokens_per_micro_batch: packed: most tokens per forward pass and replica.
        fused_linear: compute log-probs straight from hidden states, a few rows of logits at a time: the logits of a
            micro-batch, often its largest tensor, never exist as a whole. With algorithm.loss.entropy_coef or kl_coef it
            costs a second pass over the output matrix (docs/kernels.md says when it is worth it). Not with exact_*
            divergences.
        max_skipped_steps: an optimizer step whose gradients are NaN or infinite is skipped on all ranks and counted, and what
            may be to blame is kept in the run folder (evidence/). After more than so many in a row the run stops, with a
            checkpoint.
        kernel_backend: which kernels reduce the vocabulary: auto | cuda | cpu | torch; a named one is demanded.
        deterministic: off | layout: the output layer's log-probs and gradients are the same bits for any tensor-parallel
            size, with fused_linear or without, packed or padded; to find out whether two layouts differ by a mistake or by
            roundings. It makes that layer several times slower (docs/kernels.md), and the model's own body still depends on
            the layout. Not with exact_* divergences.
        optimizer: of the policy.
        optimizer_memory: how its state is kept; that of the warm start too.
    """

    steps: int = 100
    updates_per_rollout: int = 2
    batching: str = "padded"
    micro_batch_size: int = 8
    tokens_per_micro_batch: int = 8192
    fused_linear: bool = False
    max_skipped_steps: int = 3
    kernel_backend: str = "auto"
    deterministic: str = "off"
    optimizer: AdamConfig = field(default_factory=AdamConfig)
    optimizer_memory: OptimizerMemoryConfig = field(default_factory=OptimizerMemoryConfig)


@dataclass
class WarmStartConfig:
    """A supervised phase on the training tasks' reference answers, so that reinforcement learning has signal.

    Attributes:
        steps: optimizer steps; 0: none.
        batch_size: answers per step over all data-parallel replicas.
        optimizer: of this phase only.
    """

    steps: int = 0
    batch_size: int = 64
    optimizer: AdamConfig = field(default_factory=lambda: AdamConfig(lr=1e-3))


@dataclass
class TasksConfig:
    """What is trained on and what is held out.

    Attributes:
        train: at least one task.
        eval: at least one task; its problems are never trained on.
        score_timeout_s: per response; a scorer that takes longer gives reward 0 and is counted.
        score_workers: processes that score.
    """

    train: list[TaskConfig] = field(default_factory=list)
    eval: list[TaskConfig] = field(default_factory=list)
    score_timeout_s: float = 10.0
    score_workers: int = 1


@dataclass
class EvalConfig:
    """Accuracy on held-out prompts, before training, every ``every`` steps and at the end.

    Attributes:
        every: training steps; 0: only before and after.
        prompts: how many.
        samples_per_prompt: responses to each.
        temperature: 0: greedy.
    """

    every: int = 10
    prompts: int = 128
    samples_per_prompt: int = 1
    temperature: float = 1.0


@dataclass
class CheckpointConfig:
    """What is kept in the run folder.

    Attributes:
        every: training steps; 0: only at the end.
        every_seconds: as well, at the end of the step in which so many seconds have passed since the last; 0: never.
        keep: older complete checkpoints are deleted.
        export_hf: write the final policy as a Hugging Face folder.
        async_save: go on training while a checkpoint is written.
    """

    every: int = 50
    every_seconds: float = 0.0
    keep: int = 2
    export_hf: bool = True
    async_save: bool = False


@dataclass
class WandbConfig:
    """Weights & Biases, beside the other sinks.

    Attributes:
        project: that the run is shown in. None: no W&B.
        entity: user or team that owns it. None: the account's default.
        mode: online | offline. Offline, `wandb sync` sends the files in the run folder later.
    """

    project: str | None = None
    entity: str | None = None
    mode: str = "online"


@dataclass
class AlarmsConfig:
    """When to tell a person to look. Each alarm is given once, with evidence in the run folder, and stops nothing. 0: never.

    Attributes:
        window: steps whose mean is looked at, so that one noisy batch raises no alarm.
        mismatch_kl: largest `mismatch/kl_k3`: five times what bf16 policies against servers were seen at, 6e-4 to 2e-3
            (docs/mismatch.md).
        entropy_share: smallest entropy, as a share of that of the first window.
        mask_fraction: largest `dppo/mask_fraction`: beyond, a third of each batch is not learned from. The quick start is at
            0.016.
        largest_token_share: largest `dppo/largest_token_share`: beyond, single tokens own the steps (docs/algorithm.md).
        reward_flat: so many steps in which the reward did not move.
        reward_range: most that the means of their rewards differ by; noise of a batch alone is more.
    """

    window: int = 10
    mismatch_kl: float = 0.01
    entropy_share: float = 0.1
    mask_fraction: float = 0.3
    largest_token_share: float = 0.1
    reward_flat: int = 20
    reward_range: float = 0.001


@dataclass
class LoggingConfig:
    """Sinks.

    Attributes:
        tensorboard: write TensorBoard files.
        samples_per_step: decoded samples written to samples.jsonl: the worst, the best, and others spread over the batch.
        traced_tokens: of each of them, from the start, so many tokens are written with their trust-region weight, divergence
            and log-probs, for the report. 0: none. 40 bytes each.
        traced_every: training steps in which that is done, beside the first and the last one; 0: these two only.
        improvement_bound: report ``bound/*``: how much more reward than the rollout policy's the policy before the last
            optimizer step of a batch gets at least (docs/algorithm.md). Off, as it needs advantages in units of the reward.
        prometheus_port: answer http://HOST:PORT/metrics on rank 0's host with the last step's numbers; 0: do not.
        wandb: Weights & Biases.
        alarms: when to tell a person to look.
    """

    tensorboard: bool = True
    samples_per_step: int = 4
    traced_tokens: int = 512
    traced_every: int = 10
    improvement_bound: bool = False
    prometheus_port: int = 0
    wandb: WandbConfig = field(default_factory=WandbConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)


@dataclass
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
