"""The training loop: generate and score -> optimizer steps -> weight sync -> evaluation -> record -> checkpoint.

``Trainer.train`` is the page to read first; everything it calls is a method below it or a file beside it. From the loop to
the loss: ``dppo_step.run`` -> ``optimizer_step`` -> ``DPPOLoss`` -> ``loss/objective.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dppo.errors import NonFiniteGradientError, RolloutError, StoppedWaitingError, StopRequested
from megatron_dppo.loss.advantages import group_advantages
from megatron_dppo.models.hf.config import architecture
from megatron_dppo.models.hf.export import PolicyWeights
from megatron_dppo.training.checkpoint.info import TrainerState
from megatron_dppo.training.checkpoint.load import load_checkpoint
from megatron_dppo.training.checkpoint.save import CheckpointWriter
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.data.batcher import ReplicaBatch
from megatron_dppo.training.data.hand_over import ExampleHeader, HandOver
from megatron_dppo.training.data.micro_batch import ExampleFields, MicroBatch, TrainingExample, example_from_sample
from megatron_dppo.training.devices import Devices
from megatron_dppo.training.metrics.over_ranks import measures_of_all
from megatron_dppo.training.metrics.sample_log import chosen_samples
from megatron_dppo.training.metrics.sinks import MetricsLog
from megatron_dppo.training.metrics.step import phase_metrics, rollout_metrics
from megatron_dppo.training.metrics.token_record import gathered
from megatron_dppo.training.policy.dppo_step import DPPOStep
from megatron_dppo.training.policy.trainable import TrainablePolicy, build_optimizer
from megatron_dppo.training.policy.update_memory import UpdateMemory
from megatron_dppo.training.rollouts import RolloutPhase, Rollouts
from megatron_dppo.training.stop_requests import StopRequests


class Trainer:
    """Trains one policy. All ranks construct it and call ``train`` together."""

    def __init__(
        self,
        config: Config,
        policy: TrainablePolicy,
        *,
        rollout_phase: RolloutPhase,
        devices: Devices,
        checkpoint_writer: CheckpointWriter,
        stop_requests: StopRequests,
        log: MetricsLog,
        evidence: Path,
    ) -> None:
        """``policy`` is as training starts: it is the reference policy too, also where a run is resumed.

        ``evidence``: the folder for micro-batches that may be to blame for a step that was skipped.
        """
        self.config = config
        self.policy = policy
        self.weights = PolicyWeights(policy.chunks)
        self.rollout_phase = rollout_phase
        self.devices = devices
        self.checkpoint_writer = checkpoint_writer
        self.stop_requests = stop_requests
        self.log = log
        optimizer_steps = config.train.steps * config.train.updates_per_rollout
        self.optimizer_state = build_optimizer(
            policy, config.train.optimizer, optimizer_steps, config.train.optimizer_memory
        )
        self.evidence = evidence
        self.dppo_step = DPPOStep(config, policy, self.optimizer_state, self.keep_evidence)
        self.update_memory = UpdateMemory(policy, self.optimizer_state, self.dppo_step.frozen)
        self.hand_over = HandOver(sampled_fields(config, policy), self.dppo_step.routed_layers)
        self.state = TrainerState()
        self._seconds: dict[str, float] = {}
        self._last_save = time.monotonic()
        self._saved_step = -1

    def train(self) -> None:
        """Run until ``train.steps`` steps are done; goes on where a stopped run left off.

        Raises StopRequested, on all ranks, when the run was asked to stop and is saved.
        """
        with self.saved_if_asked_to_stop():
            self.resume()
        self.policy.forward_backward.take_seconds()  # of a warm start
        with self.saved_if_asked_to_stop(), self.saved_if_rollouts_stop():
            while self.state.step < self.config.train.steps:
                with self.timed("rollout"):
                    rollouts = self.generate_and_score()
                with self.devices.for_update(self.update_memory, self.timed), self.timed("update"):
                    metrics = self.dppo_step.run(self.replica_batch(rollouts), self.traced_samples(rollouts))
                self.state.step += 1
                with self.recorded(rollouts, metrics):
                    with self.timed("sync"):
                        self.sync_weights()
                    if self.is_due(self.config.eval.every):
                        self.log.phase("evaluation")
                        metrics |= self.rollout_phase.evaluate()
                diverged = self.dppo_step.skipped_in_a_row > self.config.train.max_skipped_steps
                if self.is_due(self.config.checkpoint.every) or rollouts.save or rollouts.stop is not None or diverged:
                    self.save_checkpoint()
                if diverged:
                    self.give_up()
                if rollouts.stop is not None and self.state.step < self.config.train.steps:
                    self.stop(rollouts.stop)
        self.checkpoint_writer.finish()

    def resume(self) -> None:
        """Bring weights, optimizer and engine to where the run was stopped, or to the start."""
        with self.devices.for_update(self.update_memory, self.timed):
            checkpoint = self.checkpoint_writer.last()
            if checkpoint is not None:
                self.state = load_checkpoint(checkpoint, self.policy, self.optimizer_state)
                self._saved_step = self.state.step
                self.log.say(f"resuming from {checkpoint}")
        self._seconds = {}
        self.log.start(self.state.step)
        self.sync_weights()
        if self.state.step == 0:
            self.log.record(0, self.rollout_phase.evaluate())

    def generate_and_score(self) -> Rollouts:
        """Responses to the next prompts, with rewards."""
        rollouts = self.rollout_phase.collect(
            first_prompt=self.state.prompts_drawn,
            step=self.state.step,
            stop=lambda: self.stop_requests.reason,
            save=self.is_time_for_a_checkpoint(),
        )
        self.state.prompts_drawn += self.config.rollout.prompts_per_step
        return rollouts

    def replica_batch(self, rollouts: Rollouts) -> ReplicaBatch:
        """What this replica learns from: its part of one schedule for all, and the examples in it, whoever sampled them."""
        headers = {
            report.number: ExampleHeader(
                rollouts.sources[report.number], report.prompt_tokens, report.prompt_tokens + report.response_tokens
            )
            for report in rollouts.reports
        }
        lengths = {number: header.tokens for number, header in headers.items()}
        schedules = self.dppo_step.scheduler.schedules(lengths, self.config.train.updates_per_rollout)
        owners = {number: replica for schedule in schedules for number, replica in schedule.owners().items()}
        examples = self.hand_over.hand_over(self.learnable_examples(rollouts), headers, owners)
        replica = parallel_state.get_data_parallel_rank()
        return ReplicaBatch([schedule.replicas[replica] for schedule in schedules], examples, self.hand_over.fields)

    def traced_samples(self, rollouts: Rollouts) -> dict[int, str]:
        """Those of samples.jsonl, in steps in which what becomes of their single tokens is recorded too."""
        logging, step = self.config.logging, self.state.step + 1
        every = logging.traced_every
        if logging.traced_tokens < 1 or not (step in (1, self.config.train.steps) or (every > 0 and step % every == 0)):
            return {}
        return chosen_samples(rollouts, logging.samples_per_step)

    def learnable_examples(self, rollouts: Rollouts) -> dict[int, TrainingExample]:
        """This rank's samples with their advantages, which compare the rewards of responses to the same prompt."""
        samples = {number: scored.sample for number, scored in rollouts.own.items()}
        advantages = group_advantages(
            torch.tensor([float(sample.reward or 0.0) for sample in samples.values()]),
            torch.tensor([number // self.config.rollout.samples_per_prompt for number in samples]),
            kind=self.config.algorithm.advantage,
        )
        return {n: example_from_sample(s, float(a)) for (n, s), a in zip(samples.items(), advantages, strict=True)}

    def sync_weights(self) -> None:
        """Give the engine the present weights under a new version; returns when it was seen to serve them."""
        self.state.weight_version += 1
        self.rollout_phase.engine.update_weights(self.weights, self.state.weight_version)

    def is_due(self, every: int) -> bool:
        """Every so many steps, and after the last one."""
        return self.state.step == self.config.train.steps or (every > 0 and self.state.step % every == 0)

    def is_time_for_a_checkpoint(self) -> bool:
        """By rank 0's clock: whether ``checkpoint.every_seconds`` have passed since the last checkpoint."""
        every = self.config.checkpoint.every_seconds
        return every > 0 and dist.get_rank() == 0 and time.monotonic() - self._last_save >= every

    def save_checkpoint(self) -> None:
        """Write a checkpoint, or begin to (``checkpoint.async_save``)."""
        self.log.phase("checkpoint")
        self.checkpoint_writer.save(self.policy, self.optimizer_state, self.state)
        self._last_save, self._saved_step = time.monotonic(), self.state.step

    def keep_evidence(self, suspects: Sequence[MicroBatch]) -> None:
        """Write down this rank's micro-batches whose loss is not finite: for ``torch.load``."""
        for index, batch in enumerate(suspects):
            self.evidence.mkdir(exist_ok=True)
            name = f"step_{self.state.step + 1}_skipped_{self.dppo_step.skipped_in_a_row}_rank_{dist.get_rank()}_{index}.pt"
            inputs = None if batch.inputs is None else batch.inputs.to(torch.device("cpu"))
            found = {
                "tokens": batch.tokens.cpu(),
                "rows": batch.rows.cpu(),
                "target": batch.target.cpu(),
                "inputs": inputs,
            }
            torch.save({**found, "example_indices": batch.example_indices}, self.evidence / name)

    def give_up(self) -> None:
        """End a run whose gradients are not finite any more, after a step that is saved."""
        self.checkpoint_writer.finish()
        raise NonFiniteGradientError(
            f"the gradients of {self.dppo_step.skipped_in_a_row} optimizer steps in a row were NaN or infinite"
            f" (train.max_skipped_steps = {self.config.train.max_skipped_steps}); the weights are as they were before, and"
            f" saved after step {self.state.step}. Micro-batches whose loss is not finite are in {self.evidence}"
        )

    def stop(self, reason: str) -> None:
        """End the run after a step that is saved, so that it can be started again."""
        self.checkpoint_writer.finish()
        raise StopRequested(
            f"stopped after step {self.state.step} of {self.config.train.steps} ({reason}); it is saved: start the same"
            " run.name again to go on"
        )

    @contextmanager
    def saved_if_asked_to_stop(self) -> Iterator[None]:
        """The last step is in a checkpoint when waiting for servers or responses was given up because the run is to stop."""
        try:
            yield
        except StoppedWaitingError as stopped:
            if self._saved_step != self.state.step:  # who asked may have little patience
                self.save_checkpoint()
            self.stop(f"{stopped}")

    @contextmanager
    def saved_if_rollouts_stop(self) -> Iterator[None]:
        """Whatever was trained when the engine gave out is in a checkpoint, from where the run can go on."""
        try:
            yield
        except StoppedWaitingError:
            raise
        except RolloutError:
            folder = self.checkpoint_writer.save(self.policy, self.optimizer_state, self.state)
            self.checkpoint_writer.finish()
            self.log.say(
                f"no more rollouts; step {self.state.step} is saved in {folder}, from where the run can resume"
            )
            raise

    @contextmanager
    def recorded(self, rollouts: Rollouts, metrics: dict[str, float | str]) -> Iterator[None]:
        """Log everything there is to report of the step that was just done, once what follows it is done too.

        Also if the engine gives out within: the step is done, and will be in the checkpoint. Collective.
        """
        sampled_version = self.state.weight_version
        stopped: RolloutError | None = None
        try:
            yield
        except RolloutError as error:
            stopped = error
        seconds, self._seconds = self._seconds, {}
        work = {**rollouts.seconds, "forward_backward": self.policy.forward_backward.take_seconds()}
        measures = measures_of_all({**seconds, **work})
        metrics |= rollout_metrics(rollouts, sampled_version, self.config.rollout.samples_per_prompt)
        metrics |= self.devices.metrics(self.update_memory)
        metrics |= phase_metrics(
            rollouts, float(metrics["batch/computed_tokens"]), measures, seconds.keys(), self.policy.flops
        )
        self.log.record(self.state.step, metrics)
        tokens = gathered(self.dppo_step.token_records, self.config.logging.traced_tokens)
        self.log.rollouts(self.state.step, rollouts, tokens, self.rollout_phase.token_texts)
        if stopped is not None:
            raise stopped

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the duration of a phase to this step's times."""
        self.log.phase(phase)
        _wait_for_device()
        start = time.perf_counter()
        yield
        _wait_for_device()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start


def sampled_fields(config: Config, policy: TrainablePolicy) -> ExampleFields:
    """What examples have where they are sampled."""
    experts, dtype = None, torch.uint8
    if config.algorithm.routing_replay:
        fields = architecture(policy.hf_config)
        experts = (fields["num_hidden_layers"], fields["num_experts_per_tok"])
        dtype = torch.uint8 if fields["num_experts"] <= 256 else torch.int16
    topk = config.algorithm.topk if config.algorithm.loss.needs_topk else 0
    return ExampleFields(rollout_log_probs=True, topk=topk, routed_experts=experts, expert_dtype=dtype)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
