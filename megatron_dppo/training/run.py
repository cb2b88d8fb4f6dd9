"""Putting a run together: ranks, policy, engine, scorer, folder; and taking it apart again whatever happens."""

from __future__ import annotations

from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from statistics import fmean

import megatron.core
import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from megatron_dppo.compat.optional_dependencies import probe_apex, probe_transformer_engine
from megatron_dppo.distributed.collectives import broadcast_object, on_one_rank
from megatron_dppo.distributed.layout import initialize_model_parallel, replica_group
from megatron_dppo.distributed.notice import Notice
from megatron_dppo.distributed.ranks import joined_ranks
from megatron_dppo.distributed.shared_folder import check_shared_folder
from megatron_dppo.errors import ConfigError
from megatron_dppo.models.build import initialize_randomly
from megatron_dppo.models.hf.weights import load_hf_weights, save_hf_checkpoint
from megatron_dppo.ops.backend import backend_report
from megatron_dppo.rollout.embedded.engine import EmbeddedEngine
from megatron_dppo.rollout.engine import RolloutEngine
from megatron_dppo.tasks.scoring import Scorer
from megatron_dppo.training.checkpoint.info import CheckpointInfo
from megatron_dppo.training.checkpoint.load import last_checkpoint
from megatron_dppo.training.checkpoint.save import CheckpointWriter
from megatron_dppo.training.config.schema import MODEL_DTYPES, Config
from megatron_dppo.training.devices import Devices, OwnDevices, SharedDevices
from megatron_dppo.training.inputs import RunInputs
from megatron_dppo.training.metrics.run_folder import RunFolder, json_records
from megatron_dppo.training.metrics.sinks import MetricsLog
from megatron_dppo.training.policy.trainable import TrainablePolicy, build_chunks, wrap_for_training
from megatron_dppo.training.policy.update_memory import UpdateMemory
from megatron_dppo.training.policy.warm_start import warm_start
from megatron_dppo.training.rollouts import RolloutPhase
from megatron_dppo.training.served_policy import serve_command
from megatron_dppo.training.stop_requests import StopRequests
from megatron_dppo.training.trainer import Trainer

_STEPS_COMPARED = 5


def check_run_folder(config: Config, hf_config: PretrainedConfig) -> None:
    """Raise ConfigError if the folder cannot be used, or holds a run that must not be continued, CheckpointError if it holds
    one of another model. Nothing was written then: its config.yaml still says what the model was.
    """
    folder = RunFolder(config.run)
    folder.check()
    if config.run.resume == "never" and folder.config_path.exists():
        raise ConfigError(
            f"{folder.path} holds a run already: choose another run.name, or run.resume=auto to continue it"
        )
    if (checkpoint := last_checkpoint(folder.checkpoints)) is not None:
        CheckpointInfo.read(checkpoint).check_model(
            checkpoint, hf_config, MODEL_DTYPES[config.model.dtype], config.model.fp32_head
        )


def run_training(config: Config, inputs: RunInputs, device: torch.device) -> None:
    """Train as configured, on all ranks that torchrun started."""
    with ExitStack() as stack:
        stop_requests = stack.enter_context(StopRequests(config.run.max_seconds))
        lifeline = stack.enter_context(
            joined_ranks(
                device,
                collective_timeout_s=config.parallel.collective_timeout_s,
                host_timeout_s=config.rollout.exchange_timeout_s,
            )
        )
        if dist.get_world_size() > 1:
            stop_requests.share(Notice("stop"))
        with lifeline.told_first():
            _train(config, inputs, device, stop_requests, stack)


def _train(
    config: Config, inputs: RunInputs, device: torch.device, stop_requests: StopRequests, stack: ExitStack
) -> None:
    """What is entered in ``stack`` is left when this has returned or raised."""
    # It may hold the time of the start, which ranks read at different moments.
    config.run.name = broadcast_object(config.run.name)
    folder = RunFolder(config.run)
    initialize_model_parallel(config.parallel, config.run.seed)
    on_one_rank(lambda: folder.create(config))
    check_shared_folder(folder.path, "run.root")
    writes = dist.get_rank() == 0
    log = stack.enter_context(closing(MetricsLog(folder, config, writes)))
    log.say(environment_report())
    policy = build_trainable_policy(config, inputs, device)
    engine, devices = build_engine(config, policy, folder, stop_requests)
    stack.enter_context(closing(engine))
    scorer = stack.enter_context(
        Scorer([*config.tasks.train, *config.tasks.eval], config.tasks.score_timeout_s, config.tasks.score_workers)
    )
    rollout_phase = RolloutPhase(
        config,
        inputs,
        engine=engine,
        scorer=scorer,
        replica_group=replica_group(),
    )
    keep, asynchronous = config.checkpoint.keep, config.checkpoint.async_save
    checkpoint_writer = stack.enter_context(CheckpointWriter(folder.checkpoints, keep, asynchronous))
    if config.warm_start.steps and checkpoint_writer.last() is None:
        with devices.for_update(UpdateMemory(policy), lambda phase: nullcontext()):
            warm_start(policy, config, inputs, log)
    Trainer(
        config,
        policy,
        rollout_phase=rollout_phase,
        devices=devices,
        checkpoint_writer=checkpoint_writer,
        stop_requests=stop_requests,
        log=log,
        evidence=folder.evidence,
    ).train()
    if config.checkpoint.export_hf:
        save_hf_checkpoint(
            policy.chunks,
            policy.hf_config,
            folder.exported_policy,
            tokenizer_folder=inputs.tokenizer_folder,
            model_folder=config.model.path,
            replace=True,  # that of a run which is being continued
        )
    log.say(summary(folder))


def build_trainable_policy(config: Config, inputs: RunInputs, device: torch.device) -> TrainablePolicy:
    """The policy with its first weights, ready for training."""
    dtype = MODEL_DTYPES[config.model.dtype]
    chunks = build_chunks(config.model, config.parallel, inputs.hf_config, device)
    if config.model.init == "random":
        initialize_randomly(chunks, config.run.seed)
    else:
        load_hf_weights(chunks, Path(config.model.path))
    return wrap_for_training(chunks, inputs.hf_config, dtype, config.parallel)


def build_engine(
    config: Config, policy: TrainablePolicy, folder: RunFolder, stop_requests: StopRequests
) -> tuple[RolloutEngine, Devices]:
    """The rollout engine that the configuration names, and how the trainer shares its devices with it."""
    if config.rollout.engine == "embedded":
        batch_size, embedded = config.rollout.max_batch_size, config.rollout.embedded
        return EmbeddedEngine(policy.chunks, policy.vocab_size, batch_size, embedded), OwnDevices()
    from megatron_dppo.rollout.sglang.engine import SGLangEngine  # its client is an extra

    colocated = config.rollout.sglang.colocated
    if colocated:
        UpdateMemory(policy).put_away()  # servers look at how much is free when they start
    engine = SGLangEngine(
        config.rollout.sglang,
        config.model.path,
        vocab_size=policy.vocab_size,
        dtype=policy.dtype,
        log_folder=folder.logs,
        replica_group=replica_group(),
        return_routed_experts=config.algorithm.routing_replay,
        serve_command=serve_command(folder.config_path),
        stop=lambda: stop_requests.reason,
        stop_generating=lambda: stop_requests.signal,
        fp32_head=config.model.fp32_head,
    )
    return engine, SharedDevices(engine.release_memory) if colocated else OwnDevices()


def environment_report() -> str:
    """What this run computes with, and why not with something faster."""
    parts = {
        "torch": torch.__version__,
        "megatron-core": megatron.core.__version__,
        "Transformer Engine": probe_transformer_engine().reason,
        "apex": probe_apex().reason,
        **{f"{name} kernels": state for name, state in backend_report().items() if name != "torch"},
    }
    return "\n".join(f"{name}: {state}" for name, state in parts.items())


def summary(folder: RunFolder) -> str:
    """What a run achieved, in three lines: reward at both ends, held-out accuracy at both ends, where to look."""
    records = list(json_records(folder.metrics_path))
    rewards = [record["reward/mean"] for record in records if "reward/mean" in record]
    accuracies = [record["eval/accuracy"] for record in records if "eval/accuracy" in record]
    if not rewards or not accuracies:
        return f"run folder: {folder.path} (its metrics.jsonl could not be written)"
    first, last = fmean(rewards[:_STEPS_COMPARED]), fmean(rewards[-_STEPS_COMPARED:])
    return (
        f"reward: first {first:.3f}, last {last:.3f} (mean of {min(_STEPS_COMPARED, len(rewards))} steps at either end)\n"
        f"held-out accuracy: before {accuracies[0]:.3f}, after {accuracies[-1]:.3f}\n"
        f"run folder: {folder.path}"
    )
