"""The training loop: generate -> score -> advantages -> update -> sync.

``Trainer.train`` is the page to read first; everything it calls is a method below it or a file beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_dppo.errors import RolloutError
from megatron_dppo.loss.advantages import group_advantages
from megatron_dppo.models.hf.weights import export_hf_weights, save_hf_checkpoint
from megatron_dppo.rollout.sample import SamplingParams
from megatron_dppo.training.checkpoint.info import TrainerState
from megatron_dppo.training.checkpoint.load import last_checkpoint, load_checkpoint
from megatron_dppo.training.checkpoint.save import CheckpointWriter
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.data.micro_batch import TrainingExample, example_from_sample
from megatron_dppo.training.evaluation import evaluate
from megatron_dppo.training.inputs import RunInputs
from megatron_dppo.training.metrics.run_folder import RunFolder
from megatron_dppo.training.metrics.sinks import MetricsLog
from megatron_dppo.training.metrics.step import phase_metrics, rollout_metrics
from megatron_dppo.training.policy.dppo_step import DPPOUpdate
from megatron_dppo.training.policy.trainable import TrainablePolicy, build_optimizer
from megatron_dppo.training.policy.warm_start import warm_start
from megatron_dppo.training.rollouts import RolloutPhase, ScoredRollouts


class Trainer:
    """Trains one policy. All ranks construct it and call ``train`` together."""

    def __init__(
        self,
        config: Config,
        inputs: RunInputs,
        folder: RunFolder,
        policy: TrainablePolicy,
        rollout_phase: RolloutPhase,
        checkpoint_writer: CheckpointWriter,
        log: MetricsLog,
    ) -> None:
        self.config = config
        self.inputs = inputs
        self.folder = folder
        self.policy = policy
        self.rollout_phase = rollout_phase
        self.checkpoint_writer = checkpoint_writer
        self.log = log
        self.state = TrainerState()
        self.device = next(policy.chunks[0].parameters()).device
        self._seconds: dict[str, float] = {}

    def train(self) -> None:
        """Run until ``train.steps`` steps are done; goes on where a stopped run left off."""
        self.start_or_resume()
        try:
            self.run_steps()
        except RolloutError:
            saved = self.save_checkpoint()
            self.checkpoint_writer.finish()
            self.log.say(f"no more rollouts; step {self.state.step} is saved in {saved}, from where the run can resume")
            raise
        self.checkpoint_writer.finish()
        self.export_policy()

    def run_steps(self) -> None:
        """The loop itself."""
        while self.state.step < self.config.train.steps:
            with self.timed("rollout"):
                rollouts = self.generate_and_score()
            with self.timed("update"):
                update_metrics = self.update.run(self.learnable_examples(rollouts))
            self.state.step += 1
            evaluation: dict[str, float] = {}
            try:
                with self.timed("sync"):
                    self.sync_weights()
                if self.is_due(self.config.eval.every):
                    evaluation = self.evaluate()
            except RolloutError:
                self.record_step(rollouts, update_metrics)  # it is done, and will be in the checkpoint
                raise
            self.record_step(rollouts, {**update_metrics, **evaluation})
            if self.is_due(self.config.checkpoint.every):
                self.save_checkpoint()

    def start_or_resume(self) -> None:
        """Bring weights, optimizer and engine to where training starts or was stopped."""
        checkpoint = last_checkpoint(self.folder.checkpoints)
        if checkpoint is None and self.config.warm_start.steps:
            warm_start(self.policy, self.config, self.inputs, self.log)
        train = self.config.train
        self.optimizer_state = build_optimizer(self.policy, train.optimizer, train.steps * train.updates_per_rollout)
        self.update = DPPOUpdate(self.config, self.policy, self.optimizer_state)
        if checkpoint is not None:
            self.state = load_checkpoint(checkpoint, self.policy, self.optimizer_state)
            self.log.say(f"resuming from {checkpoint}")
        self.log.start(self.state.step)
        self.sync_weights()
        if self.state.step == 0:
            self.log.record(0, self.evaluate())

    def generate_and_score(self) -> ScoredRollouts:
        """Sample responses to this replica's share of the next prompts and grade them."""
        rollout = self.config.rollout
        prompts = self.inputs.train_prompts(
            self.state.prompts_drawn,
            rollout.prompts_per_step,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        sampling = SamplingParams(
            max_new_tokens=rollout.max_response_tokens,
            temperature=self.config.algorithm.loss.temperature,
            samples_per_prompt=rollout.samples_per_prompt,
            stop_token_ids=self.inputs.stop_token_ids,
            topk_log_probs=self.config.algorithm.topk if self.config.algorithm.needs_topk else 0,
            return_routed_experts=self.config.algorithm.routing_replay,
            seed=self.config.run.seed * 1_000_003 + self.state.step,
        )
        rollouts = self.rollout_phase.collect(prompts, sampling)
        self.state.prompts_drawn += rollout.prompts_per_step
        return rollouts

    def learnable_examples(self, rollouts: ScoredRollouts) -> list[TrainingExample]:
        """Samples with their advantages; a group's baseline is the mean reward of the same prompt's other samples."""
        samples = rollouts.samples
        advantages = group_advantages(
            torch.tensor([float(sample.reward or 0.0) for sample in samples]),
            torch.tensor([sample.group_id for sample in samples]),
            self.config.algorithm.advantage,
        )
        return [example_from_sample(s, float(a)) for s, a in zip(samples, advantages, strict=True)]

    def sync_weights(self) -> None:
        """Give the engine the present weights under a new version; returns when it was seen to serve them."""
        self.state.weight_version += 1
        self.rollout_phase.engine.update_weights(export_hf_weights(self.policy.chunks), self.state.weight_version)

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy with the present weights."""
        section = self.config.eval
        sampling = SamplingParams(
            max_new_tokens=self.config.rollout.max_response_tokens,
            temperature=section.temperature,
            samples_per_prompt=section.samples_per_prompt,
            stop_token_ids=self.inputs.stop_token_ids,
            seed=self.config.run.seed,
        )
        return evaluate(self.rollout_phase, self.inputs.eval_prompts, sampling)

    def is_due(self, every: int) -> bool:
        """Every so many steps, and after the last one."""
        return self.state.step == self.config.train.steps or (every > 0 and self.state.step % every == 0)

    def save_checkpoint(self) -> Path:
        """Write a checkpoint, or begin to (``checkpoint.async_save``); returns the folder that it is, or will be, in."""
        return self.checkpoint_writer.save(self.policy, self.optimizer_state, self.state)

    def export_policy(self) -> None:
        """Write the trained policy as a Hugging Face folder."""
        if self.config.checkpoint.export_hf and not self.folder.exported_policy.exists():
            save_hf_checkpoint(
                self.policy.chunks, self.policy.hf_config, self.folder.exported_policy, self.inputs.tokenizer_folder
            )

    def record_step(self, rollouts: ScoredRollouts, other_metrics: dict[str, float | str]) -> None:
        """Log everything there is to report of the step that was just done. Collective."""
        seconds, self._seconds = self._seconds, {}
        computed_tokens = float(other_metrics["batch/computed_tokens"])
        metrics = {
            # sync_weights has moved on by one since these samples were drawn
            **rollout_metrics(rollouts, self.state.weight_version - 1),
            **phase_metrics(rollouts, computed_tokens, seconds, self.device),
            **other_metrics,
        }
        self.log.record(self.state.step, metrics)
        self.log.samples(self.state.step, rollouts, self.config.logging.samples_per_step)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the duration of a phase to this step's times."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
