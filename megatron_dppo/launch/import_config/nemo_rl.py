"""NeMo-RL's GRPO recipes (read at 0.6.0, 7ea279abf): YAML files that name the file they build on under ``defaults:``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.import_config import loss_terms, nemo_rl_cluster
from megatron_dppo.launch.import_config.nemo_rl_keys import (
    COPIED,
    DROPPED,
    DTENSOR,
    IGNORED,
    MEGATRON,
    RECOMPUTED,
    SCHEDULER,
)
from megatron_dppo.launch.import_config.translation import Source, Translation, granularity

# What its files compute with, e.g. ${mul:${policy.max_total_sequence_length}, 2}.
_RESOLVERS: dict[str, Callable[[Any, Any], Any]] = {
    "mul": lambda a, b: a * b,
    "add": lambda a, b: a + b,
    "div": lambda a, b: a / b,
    "max": lambda a, b: max(a, b),
}


def translate(path: Path) -> Translation:
    """Read a recipe with all that it builds on. Raises ConfigError."""
    tree = _read(path.resolve(), ())
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)  # renamed in 2.4
    for name, function in _RESOLVERS.items():
        register(name, function, replace=True)
    source = Source(_flat(tree))
    if not any(key.startswith("grpo.") for key in source.values):
        raise ConfigError(f"{path}: no recipe of NeMo-RL's GRPO: it has no section `grpo`")
    translation = Translation(source)
    megatron = source.is_on(f"{MEGATRON}.enabled")
    translation.copy(COPIED if megatron else {**{k: v for k, v in COPIED.items() if MEGATRON not in k}, **DTENSOR})
    translation.copy({k: v for k, v in RECOMPUTED.items() if (MEGATRON in k) == megatron}, granularity)
    if not megatron:
        source.take("policy.dtensor_cfg.enabled")
        translation.differs["policy.dtensor_cfg.enabled"] = (
            "the policy is trained with Megatron-core here, whatever trains it there; its sizes are taken as they are"
        )
    _model(translation, megatron)
    _lengths(translation)
    _batches(translation, megatron)
    _loss(translation)
    _checkpoints(translation)
    nemo_rl_cluster.translate(translation)
    _tasks(translation)
    translation.drop(DROPPED)
    translation.ignore(IGNORED)
    translation.finish()
    return translation


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    if path in seen:
        raise ConfigError(f"{path}: `defaults:` leads back to this file")
    try:
        own = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # yaml's and OmegaConf's have no common class
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(own, DictConfig):
        raise ConfigError(f"{path}: a mapping is expected at the top level")
    bases = own.pop("defaults", None) or []
    names = [bases] if isinstance(bases, str) else [str(base) for base in bases]
    tree = OmegaConf.create({})
    for part in (*(_read((path.parent / name).resolve(), (*seen, path)) for name in names), own):
        _drop_overridden(tree, part)
        try:
            tree = cast(DictConfig, OmegaConf.merge(tree, part))
        except (OmegaConfBaseException, TypeError) as error:
            raise ConfigError(f"{path}: it does not fit the files that it builds on: {error}") from error
    return tree


def _drop_overridden(base: DictConfig, own: DictConfig) -> None:
    """A section with ``_override_: true`` replaces that of the files before, as does one that is of another kind."""
    if own.pop("_override_", False):
        base.clear()
    for key in own:
        mine, before = own._get_node(key), base._get_node(key) if key in base else None
        if (
            isinstance(mine, DictConfig)
            and isinstance(before, DictConfig)
            and not (mine._is_none() or before._is_none())
        ):
            _drop_overridden(before, mine)
        elif OmegaConf.is_config(before) and OmegaConf.is_config(mine):
            base.pop(key)


def _flat(tree: DictConfig, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}, interpolations resolved; what cannot be resolved stays as it is written."""
    values: dict[str, Any] = {}
    for key in map(str, tree):
        try:
            value = tree[key]
        except OmegaConfBaseException:
            value = OmegaConf.to_container(tree, resolve=False)[key]  # type: ignore[index, call-overload]
        name = f"{prefix}{key}"
        if isinstance(value, DictConfig) and len(value):
            values |= _flat(value, f"{name}.")
        else:
            values[name] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return values


def _model(translation: Translation, megatron: bool) -> None:
    source, options = translation.source, translation.options
    name = str(source.take("policy.model_name", ""))
    options["model.path"] = f"models/{name.rsplit('/', 1)[-1]}"
    translation.differs["policy.model_name"] = "models are read from local folders, never from the network"
    precision = source.take("policy.precision", "bfloat16")
    options["model.dtype"] = {"float32": "fp32"}.get(precision, "bf16")
    if precision not in ("float32", "bfloat16"):
        translation.missing["policy.precision"] = "bf16 and fp32 are what there is"
    expert_tensor = source.take(f"{MEGATRON}.expert_tensor_parallel_size")
    if megatron and options.get("parallel.expert_model_parallel_size", 1) > 1 and expert_tensor is not None:
        options["parallel.expert_tensor_parallel_size"] = expert_tensor
    if (
        megatron
        and source.is_on(f"{MEGATRON}.freeze_moe_router")
        and options.get("parallel.expert_model_parallel_size", 1) > 1
    ):
        translation.missing[f"{MEGATRON}.freeze_moe_router"] = "routers are trained"


def _lengths(translation: Translation) -> None:
    """NeMo-RL has one limit for prompt and response together, and a limit of each that may be as large."""
    source, options = translation.source, translation.options
    total = int(source.take("policy.max_total_sequence_length", 4096))
    prompt = int(source.take("data.max_input_seq_length", total))
    prompt = prompt if prompt < total else max(1, total // 4)
    options["rollout.max_prompt_tokens"] = prompt
    options["rollout.max_response_tokens"] = min(
        int(source.take("policy.generation.max_new_tokens", total)), total - prompt
    )
    translation.differs["policy.max_total_sequence_length"] = (
        "one limit for prompt and response together there; here each has its own"
    )


def _batches(translation: Translation, megatron: bool) -> None:
    source, options = translation.source, translation.options
    samples = options.get("rollout.prompts_per_step", 1) * options.get("rollout.samples_per_prompt", 1)
    batch = int(source.take("policy.train_global_batch_size", samples))
    options["train.updates_per_rollout"] = max(1, samples // batch)
    if samples % batch:
        translation.differs["policy.train_global_batch_size"] = (
            f"it does not divide the {samples} samples of a step; here a step's updates have equal shares"
        )
    micro = source.take("policy.train_micro_batch_size", 1)
    packed = source.is_on("policy.sequence_packing.enabled")
    if packed or source.is_on("policy.dynamic_batching.enabled"):
        section = "sequence_packing" if packed else "dynamic_batching"
        options["train.batching"] = "packed"
        longest = options["rollout.max_prompt_tokens"] + options["rollout.max_response_tokens"]
        options["train.tokens_per_micro_batch"] = max(longest, source.take(f"policy.{section}.train_mb_tokens", 0))
    else:
        options["train.batching"] = "padded"
        options["train.micro_batch_size"] = micro
    if megatron and source.is_on(f"{SCHEDULER}.lr_warmup_init"):
        translation.differs[f"{SCHEDULER}.lr_warmup_init"] = "the warm-up starts from 0"
    if not megatron:
        first, second = (source.take("policy.optimizer.kwargs.betas") or [0.9, 0.999])[:2]
        options |= {"train.optimizer.adam_beta1": first, "train.optimizer.adam_beta2": second}
        translation.drop({"policy.scheduler": "set train.optimizer.lr_warmup_steps and lr_decay_style"})


def _loss(translation: Translation) -> None:
    source, options = translation.source, translation.options
    translation.differs["loss_fn"] = loss_terms.ANCHOR
    low, high = source.take("loss_fn.ratio_clip_min", 0.2), source.take("loss_fn.ratio_clip_max", 0.2)
    dual = source.take("loss_fn.ratio_clip_c")
    loss_terms.bound_on_ratio(translation, "loss_fn.ratio_clip_min", low, high, dual)
    kind = source.take("loss_fn.reference_policy_kl_type", "k3")
    penalty = source.take("loss_fn.reference_policy_kl_penalty", 0.0)
    loss_terms.kl_penalty(translation, "loss_fn.reference_policy_kl_penalty", penalty, kind)
    token_level = bool(source.take("loss_fn.token_level_loss", True))
    options["algorithm.loss.aggregation"] = "token_mean" if token_level else "seq_mean_token_mean"
    _advantage(translation)
    for key in ("use_importance_sampling_correction", "truncated_importance_sampling_type"):
        if source.is_on(f"loss_fn.{key}"):
            translation.differs[f"loss_fn.{key}"] = (
                "the ratio is pi / mu itself here, so nothing is left to correct; algorithm.loss.ratio_cap bounds it"
            )
    for bound in ("truncated_importance_sampling_ratio", "truncated_importance_sampling_ratio_min"):
        source.take(f"loss_fn.{bound}")
    if source.is_on("loss_fn.force_on_policy_ratio"):
        translation.differs["loss_fn.force_on_policy_ratio"] = (
            "the ratio is 1 there; here it is pi / mu, which differs from 1 by the engines' mismatch"
        )
    for key, reason in (("top_p", 1), ("top_k", None), ("val_top_p", 1), ("val_top_k", None)):
        if source.take(f"policy.generation.{key}", reason) not in (reason, -1):
            translation.missing[f"policy.generation.{key}"] = loss_terms.CLIPPED_SAMPLING


def _advantage(translation: Translation) -> None:
    source = translation.source
    name = source.take("grpo.adv_estimator.name", "grpo")
    divided = bool(source.take("grpo.normalize_rewards", True))
    others = bool(source.take("grpo.use_leave_one_out_baseline", True))
    kinds = {(False, False): "mean_baseline", (False, True): "rloo"}
    translation.options["algorithm.advantage"] = kinds.get((divided, others), "grpo")
    if name != "grpo":
        translation.missing["grpo.adv_estimator.name"] = "mean_baseline, rloo and grpo are what there is"
    elif divided and others:
        translation.differs["grpo.use_leave_one_out_baseline"] = (
            "they take mean and deviation of a prompt's other responses; grpo here of all of them. The paper does not divide"
            " (algorithm.advantage: mean_baseline)"
        )


def _checkpoints(translation: Translation) -> None:
    source, options = translation.source, translation.options
    if not source.take("checkpointing.enabled", True):
        options["checkpoint.every"] = 0
    translation.differs["checkpointing.keep_top_k"] = "the latest are kept, not the best"
    if not source.take("grpo.val_at_start", False):
        translation.differs["grpo.val_at_start"] = "a run is always evaluated before its first step and after its last"


def _tasks(translation: Translation) -> None:
    source, options = translation.source, translation.options
    for split, ours in (("train", "train"), ("validation", "eval")):
        one: dict[str, Any] = {}
        entries = []
        for key in [key for key in source.values if key == f"data.{split}" or key.startswith(f"data.{split}.")]:
            value = source.take(key)
            if isinstance(value, list):
                entries += [entry for entry in value if isinstance(entry, dict)]
            else:
                one[key.rsplit(".", 1)[-1]] = value
        options[f"tasks.{ours}"] = [_task(entry, split) for entry in entries or [one]]
    translation.missing["data"] = (
        "data sets are not loaded by name: write their problems to the files under tasks (docs/data.md)"
    )


def _task(entry: dict[str, Any], split: str) -> dict[str, Any]:
    path = str(entry.get("data_path") or "")
    kind = {".jsonl": "jsonl", ".parquet": "parquet"}.get(Path(path).suffix)
    if kind is None:
        return loss_terms.task(str(entry.get("dataset_name") or path or f"{split}_problems"))
    fields = {"question": entry.get("input_key"), "answer": entry.get("output_key")}
    named = {name: key for name, key in fields.items() if key}
    return {**loss_terms.task(Path(path).stem), "kind": kind, "path": path, **({"fields": named} if named else {})}
