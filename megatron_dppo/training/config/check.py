"""What cannot work is refused here, in one message that names the key and the remedy, before anything is built."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_dppo.errors import ConfigError, MissingDependencyError
from megatron_dppo.loss.advantages import ADVANTAGE_KINDS
from megatron_dppo.models.hf.config import check_policy_fits, is_moe
from megatron_dppo.ops.backend import BACKENDS, backend_report
from megatron_dppo.training.config.schema import MODEL_DTYPES, AdamConfig, Config


def check_config(config: Config, hf_config: PretrainedConfig, world_size: int) -> None:
    """Raise ConfigError for the first thing in ``config`` that cannot work with this model on so many ranks."""
    _check_choices(config)
    check_policy_fits(hf_config, config.parallel, world_size)
    config.rollout.sglang.check()
    _check_sampling(config, hf_config)
    _check_algorithm(config, hf_config)
    _check_batch_sizes(config, world_size // config.parallel.replica_size)
    _check_kernels(config)
    _check_extras(config)
    _check_optimizer("train.optimizer", config.train.optimizer)
    _check_optimizer("warm_start.optimizer", config.warm_start.optimizer)


def _check_choices(config: Config) -> None:
    for key, value, choices in (
        ("run.device", config.run.device, ("auto", "cuda", "cpu")),
        ("run.resume", config.run.resume, ("auto", "never")),
        ("model.init", config.model.init, ("pretrained", "random")),
        ("model.dtype", config.model.dtype, tuple(MODEL_DTYPES)),
        ("algorithm.advantage", config.algorithm.advantage, ADVANTAGE_KINDS),
        ("algorithm.anchor", config.algorithm.anchor, ("rollout", "recomputed")),
        ("rollout.engine", config.rollout.engine, ("embedded", "sglang")),
        ("train.batching", config.train.batching, ("padded", "packed")),
        ("train.kernel_backend", config.train.kernel_backend, BACKENDS),
    ):
        if value not in choices:
            raise ConfigError(f"{key} must be one of {', '.join(choices)}, not {value!r}")


def _check_sampling(config: Config, hf_config: PretrainedConfig) -> None:
    rollout = config.rollout
    _at_least(
        1,
        ("rollout.max_prompt_tokens", rollout.max_prompt_tokens),
        ("rollout.max_response_tokens", rollout.max_response_tokens),
        ("rollout.max_batch_size", rollout.max_batch_size),
    )
    positions = rollout.max_prompt_tokens + rollout.max_response_tokens
    if positions > hf_config.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_response_tokens = {positions}, but the model has"
            f" {hf_config.max_position_embeddings} positions: lower one of them"
        )
    if config.eval.temperature < 0:
        raise ConfigError(f"eval.temperature must be >= 0 (0: greedy), not {config.eval.temperature}")


def _check_algorithm(config: Config, hf_config: PretrainedConfig) -> None:
    algorithm = config.algorithm
    _check_topk(config, hf_config)
    if algorithm.loss.needs_topk and algorithm.anchor == "recomputed":
        raise ConfigError(
            "algorithm.anchor=recomputed exchanges the sampled tokens' log-probs only: use it with a binary divergence and"
            " direction=ratio"
        )
    if algorithm.loss.needs_rollout_logits and config.parallel.pipeline_model_parallel_size > 1:
        raise ConfigError(
            f"algorithm.loss.divergence={algorithm.loss.divergence} recomputes the rollout policy's logits beside the"
            " policy's own, which pipeline stages cannot: set parallel.pipeline_model_parallel_size=1 or use topk_*"
        )
    if algorithm.loss.needs_rollout_logits and config.train.fused_linear:
        raise ConfigError(
            f"algorithm.loss.divergence={algorithm.loss.divergence} compares whole distributions and needs logits, which"
            " train.fused_linear never makes: set one of them otherwise"
        )
    if algorithm.routing_replay and not is_moe(hf_config):
        raise ConfigError(
            f"algorithm.routing_replay=true, but a {hf_config.model_type} model routes no tokens: set it to false"
        )
    if algorithm.loss.kl_coef and config.warm_start.steps:
        raise ConfigError(
            "algorithm.loss.kl_coef with warm_start.steps: the reference policy would be the warm-started one, which a"
            " resumed run no longer has; export a warm-started policy first and use it as model.path"
        )


def _check_topk(config: Config, hf_config: PretrainedConfig) -> None:
    """Both engines return as many log-probs per token as there are tokens in the vocabulary, and no more."""
    topk = config.algorithm.topk
    if config.algorithm.loss.needs_topk and not 1 <= topk <= hf_config.vocab_size:
        raise ConfigError(
            f"algorithm.topk={topk}: with this divergence or direction it must lie between 1 and the model's vocabulary"
            f" size, {hf_config.vocab_size}"
        )


def _check_batch_sizes(config: Config, replicas: int) -> None:
    rollout, train = config.rollout, config.train
    _at_least(
        1,
        ("rollout.prompts_per_step", rollout.prompts_per_step),
        ("rollout.samples_per_prompt", rollout.samples_per_prompt),
        ("train.steps", train.steps),
        ("train.updates_per_rollout", train.updates_per_rollout),
        ("train.micro_batch_size", train.micro_batch_size),
        ("train.tokens_per_micro_batch", train.tokens_per_micro_batch),
        ("warm_start.batch_size", config.warm_start.batch_size),
        ("eval.samples_per_prompt", config.eval.samples_per_prompt),
        ("checkpoint.keep", config.checkpoint.keep),
        ("tasks.score_workers", config.tasks.score_workers),
    )
    _at_least(
        0,
        ("warm_start.steps", config.warm_start.steps),
        ("eval.every", config.eval.every),
        ("checkpoint.every", config.checkpoint.every),
        ("logging.samples_per_step", config.logging.samples_per_step),
    )
    if rollout.samples_per_prompt < 2:
        raise ConfigError(
            "rollout.samples_per_prompt must be at least 2: the advantage compares responses to one prompt"
        )
    for key, value in (
        ("rollout.prompts_per_step", rollout.prompts_per_step),
        ("warm_start.batch_size", config.warm_start.batch_size),
    ):
        if value % replicas:
            raise ConfigError(f"{key}={value} is not divisible by the {replicas} data-parallel replicas")
    _at_least(replicas, ("eval.prompts", config.eval.prompts))
    if not config.tasks.train or not config.tasks.eval:
        raise ConfigError("tasks.train and tasks.eval must each name at least one task")
    per_step, rest = divmod(
        rollout.prompts_per_step // replicas * rollout.samples_per_prompt, train.updates_per_rollout
    )
    if rest or per_step == 0:
        raise ConfigError(
            f"train.updates_per_rollout={train.updates_per_rollout} does not divide the"
            f" {rollout.prompts_per_step // replicas} x {rollout.samples_per_prompt} samples of each replica"
        )
    if train.batching == "packed":
        _check_token_budget(config)
    elif config.parallel.pipeline_model_parallel_size > 1:
        _check_pipeline_micro_batches(config, "the samples of one optimizer step", per_step)
        if config.warm_start.steps:
            _check_pipeline_micro_batches(
                config, "warm_start.batch_size per replica", config.warm_start.batch_size // replicas
            )


def _check_token_budget(config: Config) -> None:
    budget, rollout = config.train.tokens_per_micro_batch, config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if budget < longest:
        raise ConfigError(
            f"train.tokens_per_micro_batch={budget} is less than one sequence can have, rollout.max_prompt_tokens +"
            f" rollout.max_response_tokens = {longest}: raise it to at least that"
        )


def _check_pipeline_micro_batches(config: Config, name: str, sequences: int) -> None:
    """Pipeline stages exchange tensors of one shape, and interleaved ones take micro-batches in rounds of PP."""
    size, parallel = config.train.micro_batch_size, config.parallel
    if sequences % size:
        raise ConfigError(
            f"train.micro_batch_size={size} does not divide {name} ({sequences}), as it must with pipeline parallelism"
            " (train.batching=packed has no such condition)"
        )
    if parallel.chunks_per_stage > 1 and sequences // size % parallel.pipeline_model_parallel_size:
        raise ConfigError(
            f"{name} are {sequences // size} micro-batches of train.micro_batch_size={size}: with"
            f" parallel.virtual_pipeline_model_parallel_size they must be a multiple of the"
            f" {parallel.pipeline_model_parallel_size} pipeline stages (train.batching=packed has no such condition)"
        )


def _check_extras(config: Config) -> None:
    if config.rollout.engine == "sglang":
        try:
            import megatron_dppo.rollout.sglang.engine  # noqa: F401  here, not on every rank when the run is built
        except MissingDependencyError as error:
            raise ConfigError(f"rollout.engine=sglang: {error}") from error


def _check_kernels(config: Config) -> None:
    backend = config.train.kernel_backend
    state = backend_report().get(backend, "available")  # auto is always there
    if state != "available":
        raise ConfigError(f"train.kernel_backend={backend} cannot be used here: {state}; auto takes what there is")


def _check_optimizer(key: str, adam: AdamConfig) -> None:
    if adam.lr_decay_style not in ("constant", "linear", "cosine"):
        raise ConfigError(f"{key}.lr_decay_style must be constant, linear or cosine, not {adam.lr_decay_style!r}")
    if not adam.lr > 0 or not 0 <= adam.min_lr <= adam.lr:
        raise ConfigError(f"{key}: lr must be positive and 0 <= min_lr <= lr, not lr={adam.lr}, min_lr={adam.min_lr}")
    if adam.lr_warmup_steps < 0 or adam.clip_grad < 0:
        raise ConfigError(f"{key}: lr_warmup_steps and clip_grad must not be negative")


def _at_least(minimum: int, *entries: tuple[str, int]) -> None:
    for key, value in entries:
        if value < minimum:
            raise ConfigError(f"{key} must be at least {minimum}, not {value}")
