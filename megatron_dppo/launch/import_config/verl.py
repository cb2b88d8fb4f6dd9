"""verl's overrides (read at 0.10.0.dev, 1dda039b9), as a list of lines or in the shell script that passes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.import_config import loss_terms
from megatron_dppo.launch.import_config.shell_overrides import read_overrides
from megatron_dppo.launch.import_config.translation import Source, Translation, granularity
from megatron_dppo.launch.import_config.verl_keys import (
    ACTOR,
    COPIED,
    DROPPED,
    IGNORED,
    MEGATRON,
    RECOMPUTED,
    ROLLOUT,
    TRANSFORMER,
)

_AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "seq_mean_token_mean",
    "seq-mean-token-sum": "seq_mean_token_sum_norm",
    "seq-mean-token-sum-norm": "seq_mean_token_sum_norm",
}
_KL_ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
# Only the end of these is read.
_PATHS = ("actor_rollout_ref.model.path", "data.train_files", "data.val_files")
_NO_CAP = 1000.0  # from here on a cap is meant to be none


def translate(path: Path) -> Translation:
    """Read a file of overrides. Raises ConfigError."""
    try:
        values = read_overrides(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not any(key.startswith("actor_rollout_ref.") for key in values):
        raise ConfigError(f"{path}: no overrides of verl: nothing in it sets actor_rollout_ref.*")
    source = Source(values)
    translation = Translation(source)
    for key in [key for key, value in values.items() if "$" in str(value) and key not in _PATHS]:
        translation.missing[key] = "a shell decides it when the script runs"
        source.values = {name: value for name, value in source.values.items() if name != key}
    translation.copy(COPIED)
    translation.copy(RECOMPUTED, granularity)
    _model(translation)
    _batches(translation)
    _loss(translation)
    _bound(translation)
    _servers(translation)
    _tasks(translation)
    translation.drop(DROPPED)
    translation.ignore(IGNORED)
    translation.finish()
    return translation


def _model(translation: Translation) -> None:
    source, options = translation.source, translation.options
    name = str(source.take("actor_rollout_ref.model.path", "")).rsplit("/", 1)[-1]
    if "$" in name:
        translation.missing["actor_rollout_ref.model.path"] = "a shell decides it when the script runs: set model.path"
    options["model.path"] = "" if "$" in name else f"models/{name}"
    if (recomputed := source.take(f"{TRANSFORMER}.recompute_granularity")) in ("full", "selective"):
        options["model.recompute.granularity"] = recomputed
    if source.take(f"{MEGATRON}.router_replay.mode", source.take(f"{ACTOR}.router_replay.mode")) == "R3":
        options["algorithm.routing_replay"] = True
    for section in (MEGATRON, f"{ACTOR}.fsdp_config"):
        if source.is_on(f"{section}.optimizer_offload") or source.is_on(f"{section}.param_offload"):
            translation.differs[f"{section}.optimizer_offload"] = (
                "with colocated servers optimizer state leaves the GPU between updates; weights stay"
            )
    if source.take(f"{ACTOR}.strategy", "megatron") != "megatron":
        translation.differs[f"{ACTOR}.strategy"] = "the policy is trained with Megatron-core here"
    betas = source.take(f"{ACTOR}.optim.betas", [0.9, 0.999])
    options |= {"train.optimizer.adam_beta1": betas[0], "train.optimizer.adam_beta2": betas[1]}
    options.setdefault("train.optimizer.weight_decay", 0.01)  # verl's default
    warmup = source.take(f"{ACTOR}.optim.lr_warmup_steps", -1)
    options["train.optimizer.lr_warmup_steps"] = max(0, warmup)
    translation.drop({f"{ACTOR}.optim.lr_warmup_steps_ratio": "set train.optimizer.lr_warmup_steps"})


def _batches(translation: Translation) -> None:
    source, options = translation.source, translation.options
    prompts = options.setdefault("rollout.prompts_per_step", 1024)  # verl's defaults
    options.setdefault("rollout.samples_per_prompt", 1)
    mini = source.take(f"{ACTOR}.ppo_mini_batch_size", 256)
    options["train.updates_per_rollout"] = max(1, prompts // mini)
    if (epochs := source.take(f"{ACTOR}.ppo_epochs", 1)) != 1:
        translation.missing[f"{ACTOR}.ppo_epochs"] = "every sample is used once"
    if prompts % mini and epochs == 1:
        translation.differs[f"{ACTOR}.ppo_mini_batch_size"] = (
            f"it does not divide {prompts} prompts; here a step's updates have equal shares"
        )
    per_gpu = source.take(f"{ACTOR}.ppo_max_token_len_per_gpu", 16384)
    micro = source.take(f"{ACTOR}.ppo_micro_batch_size_per_gpu", 1)
    if source.is_on(f"{ACTOR}.use_dynamic_bsz"):
        longest = options.setdefault("rollout.max_prompt_tokens", 512) + options.setdefault(
            "rollout.max_response_tokens", 512
        )
        context = options.get("parallel.context_parallel_size", 1)
        options |= {"train.batching": "packed", "train.tokens_per_micro_batch": max(longest, per_gpu * context)}
        translation.differs[f"{ACTOR}.ppo_max_token_len_per_gpu"] = (
            "tokens of a GPU there, of all context-parallel ranks together here"
        )
    else:
        options |= {"train.batching": "padded", "train.micro_batch_size": micro}


def _loss(translation: Translation) -> None:
    source, options = translation.source, translation.options
    divided = source.take("algorithm.norm_adv_by_std_in_grpo", True)
    estimator = source.take("algorithm.adv_estimator", "gae")
    options["algorithm.advantage"] = {"rloo": "rloo"}.get(estimator, "grpo" if divided else "mean_baseline")
    if estimator not in ("grpo", "rloo"):
        translation.missing["algorithm.adv_estimator"] = "mean_baseline, rloo and grpo are what there is"
    mode = source.take(f"{ACTOR}.loss_agg_mode", "token-mean")
    options["algorithm.loss.aggregation"] = _AGGREGATIONS.get(mode, "token_mean")
    if mode.startswith("seq-mean-token-sum"):
        longest = options.get("rollout.max_response_tokens", 512)
        scale = source.take(f"{ACTOR}.loss_scale_factor", longest) if mode.endswith("norm") else 1
        options["algorithm.loss.horizon"] = scale
    elif mode == "token-mean":
        translation.differs[f"{ACTOR}.loss_agg_mode"] = (
            "a mean over the tokens of all ranks and micro-batches of an update, however they are split"
        )
    if source.is_on(f"{ACTOR}.use_kl_loss"):
        kind = _KL_ESTIMATORS.get(str(source.take(f"{ACTOR}.kl_loss_type", "low_var_kl")).rstrip("+"), "k3")
        loss_terms.kl_penalty(translation, f"{ACTOR}.kl_loss_coef", source.take(f"{ACTOR}.kl_loss_coef", 0.001), kind)
    for unused in ("kl_loss_coef", "kl_loss_type"):
        source.take(f"{ACTOR}.{unused}")
    anchored = source.is_on("algorithm.rollout_correction.bypass_mode")
    if not anchored:
        translation.differs[f"{ACTOR}.policy_loss.loss_mode"] = loss_terms.ANCHOR
    translation.drop(
        {
            "algorithm.rollout_correction.rollout_is": "the ratio is pi / mu itself here: nothing is left to correct",
            "algorithm.rollout_correction.rollout_rs": "no sample is left out; a token outside of the trust region is masked",
        }
    )


def _bound(translation: Translation) -> None:
    """verl's DPPO keeps its thresholds where PPO's clip ratios are."""
    source, options = translation.source, translation.options
    both = source.take(f"{ACTOR}.clip_ratio", 0.2)
    low, high = source.take(f"{ACTOR}.clip_ratio_low", both), source.take(f"{ACTOR}.clip_ratio_high", both)
    cap = source.take(f"{ACTOR}.clip_ratio_c", 3.0)
    mode = source.take(f"{ACTOR}.policy_loss.loss_mode", "vanilla")
    if mode in ("dppo_tv", "dppo_kl"):
        options |= {
            "algorithm.loss.divergence": f"binary_{mode[-2:]}",
            "algorithm.loss.delta_low": low,
            "algorithm.loss.delta_high": high,
            "algorithm.loss.ratio_cap": None if cap >= _NO_CAP else cap,
        }
        translation.differs[f"{ACTOR}.clip_ratio_c"] = (
            "the largest ratio that counts, 3 there unless it is set (docs/rosetta.md)"
        )
    else:
        if mode != "vanilla":
            translation.missing[f"{ACTOR}.policy_loss.loss_mode"] = "another method; this is DPPO-Binary-TV instead"
        loss_terms.bound_on_ratio(translation, f"{ACTOR}.clip_ratio_low", low, high, cap)
    for key, off in (("top_p", 1), ("top_k", -1)):
        if source.take(f"{ROLLOUT}.{key}", off) not in (off, 0, 1.0):
            translation.missing[f"{ROLLOUT}.{key}"] = loss_terms.CLIPPED_SAMPLING


def _servers(translation: Translation) -> None:
    source, options = translation.source, translation.options
    options["rollout.engine"] = "sglang"
    if source.take(f"{ROLLOUT}.name", "vllm") != "sglang":
        translation.differs[f"{ROLLOUT}.name"] = "SGLang serves here; its log-probs are the anchor"
    size, experts = (
        source.take(f"{ROLLOUT}.tensor_model_parallel_size", 2),
        source.take(f"{ROLLOUT}.expert_parallel_size", 1),
    )
    arguments = ["--ep-size", str(min(size, experts))] if experts > 1 else []
    if (memory := source.take(f"{ROLLOUT}.gpu_memory_utilization")) is not None:
        arguments += ["--mem-fraction-static", str(memory)]
        translation.differs[f"{ROLLOUT}.gpu_memory_utilization"] = (
            "SGLang's share is of weights and KV cache alone, activations come on top"
        )
    nodes, gpus = options.setdefault("launch.trainer_nodes", 1), options.setdefault("launch.gpus_per_node", 8)
    options |= {"rollout.sglang.tensor_model_parallel_size": size, "rollout.sglang.extra_args": arguments}
    options["rollout.sglang.num_servers"] = max(1, nodes * gpus // size)
    if nodes == 1:
        options["rollout.sglang.colocated"] = True
    else:
        options["launch.server_nodes"] = nodes
        translation.missing["trainer.nnodes"] = (
            f"trainer and servers share GPUs on one host only: here {nodes} nodes train and as many more serve; change both"
        )


def _tasks(translation: Translation) -> None:
    source = translation.source
    for split, ours in (("train", "train"), ("val", "eval")):
        files: Any = source.take(f"data.{split}_files") or f"{split}.parquet"
        names = files if isinstance(files, list) else [files]
        translation.options[f"tasks.{ours}"] = [loss_terms.parquet_task(str(name).strip("'\"")) for name in names]
    translation.differs["data.train_files"] = (
        "their rows are read as they are (docs/data.md); how they are graded is a task's own, whatever data_source says"
    )
    for key in ("checkpoint.every", "eval.every"):
        if translation.options.get(key, 0) < 0:
            translation.options[key] = 0  # -1 there: never
