"""What cannot work is refused here, in one message that names the key and the remedy, before anything is built."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import operator
import shutil
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

from megatron_dppo.errors import ConfigError, MissingDependencyError
from megatron_dppo.loss.advantages import ADVANTAGE_KINDS
from megatron_dppo.models.hf.config import check_policy_fits, is_moe
from megatron_dppo.models.kernels import MODEL_BACKENDS
from megatron_dppo.ops.backend import BACKENDS, backend_report
from megatron_dppo.ops.tile_tree import DETERMINISTIC
from megatron_dppo.rollout.embedded.config import NOT_ROUNDED
from megatron_dppo.rollout.sglang.config import ROUTER_DROPS_EXPERTS
from megatron_dppo.training.config.how_it_is_computed import check_how_it_is_computed
from megatron_dppo.training.config.schema import MODEL_DTYPES, AdamConfig, Config
from megatron_dppo.training.config.shared_devices import check_shared_devices
from megatron_dppo.training.served_policy import served_policy

# The least that a number may be. Those of parallel, algorithm.loss, rollout.sglang and the tasks: their classes check them.
_AT_LEAST = {
    "run.seed": 0,
    "run.max_seconds": 0,
    "algorithm.topk": 1,
    "algorithm.max_mismatch": 0,
    "model.recompute.num_layers": 1,
    "rollout.max_prompt_tokens": 1,
    "rollout.max_response_tokens": 1,
    "rollout.max_batch_size": 1,
    "rollout.prompts_per_step": 1,
    "rollout.samples_per_prompt": 1,
    "rollout.max_failed_share": 0,
    "train.steps": 1,
    "train.updates_per_rollout": 1,
    "train.micro_batch_size": 1,
    "train.max_skipped_steps": 0,
    "train.tokens_per_micro_batch": 1,
    "warm_start.steps": 0,
    "warm_start.batch_size": 1,
    "tasks.score_workers": 1,
    "eval.every": 0,
    "eval.samples_per_prompt": 1,
    "eval.temperature": 0,
    "checkpoint.every": 0,
    "checkpoint.every_seconds": 0,
    "checkpoint.keep": 1,
    "logging.samples_per_step": 0,
    "logging.traced_tokens": 0,
    "logging.traced_every": 0,
    "logging.prometheus_port": 0,
    "logging.alarms.window": 1,
    **{
        f"logging.alarms.{name}": 0 for name in ("mismatch_kl", "entropy_share", "mask_fraction", "largest_token_share")
    },
    "logging.alarms.reward_flat": 0,
    "logging.alarms.reward_range": 0,
    **{
        f"{optimizer}.{name}": 0
        for optimizer in ("train.optimizer", "warm_start.optimizer")
        for name in ("lr_warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "clip_grad")
    },
}
_ABOVE_ZERO = (
    "rollout.exchange_timeout_s",
    "tasks.score_timeout_s",
    *(
        f"{optimizer}.{name}"
        for optimizer in ("train.optimizer", "warm_start.optimizer")
        for name in ("lr", "adam_eps")
    ),
)
_MAX_SEED = 2**32 - 1  # it is multiplied by 1,000,003 for the seeds of steps, which have to fit into 64 bits


def check_config(config: Config, hf_config: PretrainedConfig, world_size: int) -> None:
    """Raise ConfigError for the first thing in ``config`` that cannot work with this model on so many ranks."""
    _check_numbers(config)
    _check_choices(config)
    _check_sinks(config)
    check_policy_fits(hf_config, config.parallel, world_size)
    config.rollout.sglang.check()
    _check_rounding(config, hf_config)
    _check_timeouts(config)
    _check_sampling(config, hf_config)
    _check_algorithm(config, hf_config)
    _check_batch_sizes(config)
    _check_kernels(config)
    check_how_it_is_computed(config, hf_config)
    _check_extras(config)
    check_shared_devices(config, world_size)
    _check_optimizer("train.optimizer", config.train.optimizer)
    _check_optimizer("warm_start.optimizer", config.warm_start.optimizer)


def _check_choices(config: Config) -> None:
    for key, value, choices in (
        ("run.device", config.run.device, ("auto", "cuda", "cpu")),
        ("run.resume", config.run.resume, ("auto", "never")),
        ("model.init", config.model.init, ("pretrained", "random")),
        ("model.dtype", config.model.dtype, tuple(MODEL_DTYPES)),
        ("model.backend", config.model.backend, MODEL_BACKENDS),
        ("algorithm.advantage", config.algorithm.advantage, ADVANTAGE_KINDS),
        ("algorithm.anchor", config.algorithm.anchor, ("rollout", "recomputed")),
        ("rollout.engine", config.rollout.engine, ("embedded", "sglang")),
        ("train.batching", config.train.batching, ("padded", "packed")),
        ("train.kernel_backend", config.train.kernel_backend, BACKENDS),
        ("train.deterministic", config.train.deterministic, DETERMINISTIC),
        ("logging.wandb.mode", config.logging.wandb.mode, ("online", "offline")),
    ):
        if value not in choices:
            raise ConfigError(f"{key} must be one of {', '.join(choices)}, not {value!r}")


def _check_sinks(config: Config) -> None:
    logging = config.logging
    if logging.prometheus_port > 65535:
        raise ConfigError(f"logging.prometheus_port={logging.prometheus_port} is no port: at most 65535")
    for option, is_on, package, extra in (
        ("logging.tensorboard", logging.tensorboard, "tensorboard", "train"),
        ("logging.wandb.project", logging.wandb.project, "wandb", "wandb"),
    ):
        if is_on and importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                f"{option} is set and {package} is not installed: pip install 'megatron-dppo[{extra}]', or switch it off",
                name=package,
            )


def _check_timeouts(config: Config) -> None:
    """Whoever waits for something must be more patient than what it waits for: else the wrong one gives up, with the wrong
    message.
    """
    sglang = config.rollout.sglang
    generating = (
        ("rollout.sglang.generate_timeout_s", sglang.generate_timeout_s),
        (
            "rollout.sglang.startup_timeout_s + rollout.sglang.sync_timeout_s",
            sglang.startup_timeout_s + sglang.sync_timeout_s,
        ),
    )
    within_exchange = [("tasks.score_timeout_s", config.tasks.score_timeout_s)]
    within_scoring = []
    for task in (*config.tasks.train, *config.tasks.eval):
        if task.http_reward is not None:
            name = f"tasks: {task.name}: http_reward.timeout_s x tries and the waits between them"
            within_scoring.append((name, task.http_reward.longest_s))
        if task.code_reward is not None:
            within_scoring.append((f"tasks: {task.name}: code_reward.timeout_s", task.code_reward.timeout_s))
    within_collective = []
    if config.rollout.engine == "sglang":
        within_exchange += generating
        # All ranks join the parameters that rank 0 sends: they wait for it as long as servers take.
        within_collective.append(("rollout.sglang.sync_timeout_s", sglang.sync_timeout_s))
    for outer, patience, inner in (
        ("rollout.exchange_timeout_s", config.rollout.exchange_timeout_s, within_exchange),
        ("tasks.score_timeout_s", config.tasks.score_timeout_s, within_scoring),
        ("parallel.collective_timeout_s", config.parallel.collective_timeout_s, within_collective),
    ):
        for name, value in inner:
            if value >= patience:
                raise ConfigError(
                    f"{name} = {value:g} s must be below {outer} = {patience:g} s, within which it happens: raise the latter"
                )


def _check_rounding(config: Config, hf_config: PretrainedConfig) -> None:
    embedded = config.rollout.embedded
    if embedded.rounds and config.rollout.engine != "embedded":
        raise ConfigError(
            f"rollout.embedded.* rounds weights, but rollout.engine={config.rollout.engine} generates with its own: choose"
            " rollout.engine=embedded, or give the servers a dtype"
        )
    if embedded.router_rounding != NOT_ROUNDED and not is_moe(hf_config):
        raise ConfigError(
            f"rollout.embedded.router_rounding={embedded.router_rounding}, but a {hf_config.model_type} model has no"
            f" routers: set it to {NOT_ROUNDED}"
        )


def _check_sampling(config: Config, hf_config: PretrainedConfig) -> None:
    rollout = config.rollout
    positions = rollout.max_prompt_tokens + rollout.max_response_tokens
    if positions > hf_config.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_response_tokens = {positions}, but the model has"
            f" {hf_config.max_position_embeddings} positions: lower one of them"
        )


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
    if algorithm.loss.needs_rollout_logits and config.train.deterministic == "layout":
        raise ConfigError(
            f"algorithm.loss.divergence={algorithm.loss.divergence} adds up in the order of the shards, which"
            " train.deterministic=layout does not cover: use a binary_* or topk_* divergence"
        )
    if config.logging.improvement_bound and (algorithm.advantage == "grpo" or algorithm.anchor == "recomputed"):
        raise ConfigError(
            "logging.improvement_bound compares the rewards expected of the engine's policy and of the trained one: set it to"
            " false, or algorithm.anchor=rollout and algorithm.advantage to mean_baseline or rloo, which do not rescale them"
        )
    if algorithm.routing_replay and config.rollout.engine == "sglang" and config.rollout.sglang.router is not None:
        raise ConfigError(ROUTER_DROPS_EXPERTS)
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
    if config.algorithm.loss.needs_topk and topk > hf_config.vocab_size:
        raise ConfigError(
            f"algorithm.topk={topk}: with this divergence or direction it can be at most the model's vocabulary size,"
            f" {hf_config.vocab_size}"
        )


def _check_batch_sizes(config: Config) -> None:
    """Shares of replicas may be uneven, and some may have none; what there is to share must be there."""
    rollout, train = config.rollout, config.train
    if rollout.samples_per_prompt < 2:
        raise ConfigError(
            "rollout.samples_per_prompt must be at least 2: the advantage compares responses to one prompt"
        )
    if rollout.log_prob_floor >= 0:
        raise ConfigError(f"rollout.log_prob_floor must be below 0, not {rollout.log_prob_floor:g}")
    if rollout.max_failed_share >= 1:
        raise ConfigError(f"rollout.max_failed_share must be below 1, not {rollout.max_failed_share}")
    if config.eval.prompts < 1:
        raise ConfigError(f"eval.prompts must be at least 1, not {config.eval.prompts}")
    if not config.tasks.train or not config.tasks.eval:
        raise ConfigError("tasks.train and tasks.eval must each name at least one task")
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    if samples < train.updates_per_rollout:
        raise ConfigError(
            f"train.updates_per_rollout={train.updates_per_rollout} is more than the {samples} samples of a step"
        )
    if train.batching == "packed":
        _check_token_budget(config)


def _check_token_budget(config: Config) -> None:
    budget, rollout = config.train.tokens_per_micro_batch, config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if budget < longest:
        raise ConfigError(
            f"train.tokens_per_micro_batch={budget} is less than one sequence can have, rollout.max_prompt_tokens +"
            f" rollout.max_response_tokens = {longest}: raise it to at least that"
        )


def _check_extras(config: Config) -> None:
    if config.rollout.engine == "sglang":
        python = config.rollout.sglang.python
        if python is not None and config.rollout.sglang.starts_servers_here and shutil.which(python) is None:
            raise ConfigError(f"rollout.sglang.python={python} is no program that can be run")
        served_policy(config)  # that it fits the trainer
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
    if not 0 <= adam.min_lr <= adam.lr:
        raise ConfigError(f"{key}: 0 <= min_lr <= lr must hold, not lr={adam.lr}, min_lr={adam.min_lr}")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(adam, name) >= 1:
            raise ConfigError(f"{key}.{name} must be below 1, not {getattr(adam, name)}")


def _check_numbers(config: Config) -> None:
    """What no model and no layout is needed to know."""
    for key, value in _numbers(config):
        if not math.isfinite(value):
            raise ConfigError(f"{key} must be a finite number, not {value}")
    for key, least in _AT_LEAST.items():
        if _option(config, key) < least:
            raise ConfigError(f"{key} must be at least {least}, not {_option(config, key)}")
    for key in _ABOVE_ZERO:
        if _option(config, key) <= 0:
            raise ConfigError(f"{key} must be above 0, not {_option(config, key)}")
    if config.run.seed > _MAX_SEED:
        raise ConfigError(f"run.seed must be at most {_MAX_SEED}, not {config.run.seed}")


def _option(config: Config, key: str) -> Any:
    return operator.attrgetter(key)(config)


def _numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of the configuration, with its name; lists of sections included."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{key}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    yield from _numbers(item, f"{key}[{index}].")
        elif isinstance(value, (int, float)):
            yield key, value
