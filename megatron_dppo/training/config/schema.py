"""Every option of a training run, its default and its meaning: the only place where defaults of the trainer live.

Sections that belong to a lower layer are that layer's own dataclasses (``DPPOConfig``, ``ParallelConfig``,
``SGLangConfig``, ``TaskConfig``), so a default is never stated twice. ``load_config`` (config_loading.py) reads YAML into
these classes; ``check_config`` (config_checks.py) refuses what cannot work.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dppo.distributed.layout import ParallelConfig
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.tasks.config import TaskConfig


@dataclass
class RunConfig:
    """Where the run lives and how it is repeated."""

    name: str | None = None  # None: the configuration file's name and the time of the start
    root: str = "runs"
    seed: int = 1234
    device: str = "auto"  # auto | cuda | cpu
    resume: str = (
        "auto"  # auto: from the last complete checkpoint, if the run folder has one | never: refuse a used folder
    )


@dataclass
class ModelConfig:
    """The policy: a Hugging Face folder with config.json, tokenizer and (unless init is random) safetensors."""

    path: str = ""
    tokenizer: str | None = None  # None: the model's folder
    chat: bool = True  # use the tokenizer's chat template, if it has one
    init: str = "pretrained"  # pretrained | random
    dtype: str = "bf16"  # bf16 | fp32
    recompute_activations: bool = False  # full recomputation of every layer in the backward pass


@dataclass
class AlgorithmConfig:
    """What is optimised beyond the loss itself."""

    loss: DPPOConfig = field(default_factory=DPPOConfig)
    advantage: str = "mean_baseline"  # mean_baseline | rloo | grpo
    topk: int = 20  # K of topk_tv, topk_kl and of the predictive direction's estimators
    # What the ratio and the divergence are measured against. "recomputed" (the policy's own log-probs before the first
    # update) is the ablation that the paper shows to collapse; it also costs one more forward pass.
    anchor: str = "rollout"  # rollout | recomputed
    # MoE policies: route every token in training as the engine routed it, so that a router that rounds differently does not
    # show up as a policy that has moved.
    routing_replay: bool = False

    @property
    def needs_topk(self) -> bool:
        """Whether the engine has to return top-K log-probs."""
        return self.loss.divergence.startswith("topk_") or self.loss.direction == "predictive"


@dataclass
class RolloutConfig:
    """How responses are sampled."""

    engine: str = "embedded"  # embedded | sglang
    prompts_per_step: int = 16  # over all data-parallel replicas
    samples_per_prompt: int = 8
    max_prompt_tokens: int = 512
    max_response_tokens: int = 512
    # The sampling temperature is algorithm.loss.temperature: responses are drawn and scored under the same one.
    # Truncated sampling changes the support of the rollout policy and is refused; the options exist to say so.
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_batch_size: int = 256  # embedded: sequences decoded at once per replica
    sglang: SGLangConfig = field(default_factory=SGLangConfig)


@dataclass
class OptimizerSection:
    """Adam with weight decay, learning-rate warm-up and decay, and gradient clipping by global norm."""

    lr: float = 1e-6
    min_lr: float = 0.0
    lr_warmup_steps: int = 0  # optimizer steps
    lr_decay_style: str = "constant"  # constant | linear | cosine
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class TrainConfig:
    """The update phase."""

    steps: int = 100  # rollout batches
    updates_per_rollout: int = 2  # optimizer steps per rollout batch; from the second on the data are off-policy
    # padded: sequences of similar length, padded to the longest of each micro-batch | packed: sequences end to end, no
    # padding, as many as fit a token budget. Same numbers; packed wastes nothing where lengths differ widely.
    batching: str = "padded"
    micro_batch_size: int = 8  # padded: sequences per forward pass and replica
    tokens_per_micro_batch: int = 8192  # packed: most tokens per forward pass and replica
    # Compute log-probs straight from hidden states, a few rows of logits at a time: the logits of a micro-batch, often its
    # largest tensor, never exist as a whole. Costs a second pass over the output matrix. Not with exact_* divergences.
    fused_linear: bool = False
    kernel_backend: str = (
        "auto"  # auto | cuda | cpu | torch: which kernels reduce the vocabulary; a named one is demanded
    )
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)


@dataclass
class WarmStartConfig:
    """A supervised phase on the training tasks' reference answers, so that reinforcement learning has signal."""

    steps: int = 0  # 0: none
    batch_size: int = 64  # over all data-parallel replicas
    optimizer: OptimizerSection = field(default_factory=lambda: OptimizerSection(lr=1e-3))


@dataclass
class TasksConfig:
    """What is trained on and what is held out."""

    train: list[TaskConfig] = field(default_factory=list)
    eval: list[TaskConfig] = field(default_factory=list)
    score_timeout_s: float = 10.0  # per response; a scorer that takes longer gives reward 0 and is counted
    score_workers: int = 1


@dataclass
class EvalConfig:
    """Accuracy on held-out prompts, before training, every ``every`` steps and at the end."""

    every: int = 10  # training steps; 0: only before and after
    prompts: int = 128
    samples_per_prompt: int = 1
    temperature: float = 1.0  # 0: greedy


@dataclass
class CheckpointConfig:
    """What is kept in the run folder."""

    every: int = 50  # training steps; 0: only at the end
    keep: int = 2  # older complete checkpoints are deleted
    export_hf: bool = True  # write the final policy as a Hugging Face folder
    async_save: bool = False  # go on training while a checkpoint is written


@dataclass
class LoggingConfig:
    """Sinks."""

    tensorboard: bool = True
    samples_per_step: int = 4  # decoded samples written to samples.jsonl


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
