"""A short supervised phase: maximum likelihood of the training tasks' reference answers.

Reinforcement learning needs a policy that is sometimes right. A pretrained model is; a small one built from scratch gets
there here, through the same model, batches and optimizer step as the main phase.
"""

from __future__ import annotations

import time

import torch
from megatron.core import parallel_state

from megatron_dppo.errors import TaskError
from megatron_dppo.training.config.schema import Config, TrainConfig
from megatron_dppo.training.data.batcher import MicroBatcher, ReplicaBatch
from megatron_dppo.training.data.micro_batch import ExampleFields, MicroBatch, TrainingExample
from megatron_dppo.training.data.schedule import Scheduler
from megatron_dppo.training.inputs import RunInputs
from megatron_dppo.training.metrics.sinks import MetricsLog
from megatron_dppo.training.policy.head_outputs import response_log_probs
from megatron_dppo.training.policy.optimizer_step import MicroBatchLoss, optimizer_step
from megatron_dppo.training.policy.trainable import TrainablePolicy, build_optimizer

_REPORTS = 4  # lines printed over the whole phase


def warm_start(policy: TrainablePolicy, config: Config, inputs: RunInputs, log: MetricsLog) -> None:
    """Run ``warm_start.steps`` supervised steps with an optimizer of their own. Collective over all ranks."""
    section, start = config.warm_start, time.perf_counter()
    optimizer_state = build_optimizer(policy, section.optimizer, section.steps, config.train.optimizer_memory)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    scheduler = Scheduler(config.train, config.parallel, replicas, policy.flops.training)
    batcher = MicroBatcher(scheduler)
    for step in range(section.steps):
        # Every rank reads all answers: they are few and short, and so nobody has to be told anything.
        examples = {n: _reference_example(inputs, step * section.batch_size + n) for n in range(section.batch_size)}
        schedule = scheduler.schedule({n: len(example.token_ids) for n, example in examples.items()})
        micro_batches = batcher.micro_batches(ReplicaBatch([schedule.replicas[replica]], examples, ExampleFields()), 0)
        outcome = optimizer_step(
            policy,
            optimizer_state,
            micro_batches,
            lambda batch, hidden, _: _likelihood(policy, config.train, batch, hidden),
        )
        if (step + 1) % max(section.steps // _REPORTS, 1) == 0:
            log.say(
                f"warm start {step + 1}/{section.steps}  grad norm {outcome.grad_norm:.2f}"
                f"  {time.perf_counter() - start:.0f} s"
            )
    policy.gather_weights()


def _reference_example(inputs: RunInputs, index: int) -> TrainingExample:
    problem = inputs.train_problems.problem(index)
    if problem.answer is None:
        raise TaskError(f"{problem.problem_id} has no reference answer, which the warm start learns from")
    prompt = inputs.prompt(problem)
    answer = inputs.tokenizer(problem.answer, add_special_tokens=False)["input_ids"]
    return TrainingExample(
        token_ids=torch.tensor([*prompt.token_ids, *answer, inputs.stop_token_ids[0]], dtype=torch.int32),
        prompt_length=len(prompt.token_ids),
    )


def _likelihood(policy: TrainablePolicy, train: TrainConfig, batch: MicroBatch, hidden: torch.Tensor) -> MicroBatchLoss:
    """Negative log-likelihood of the answers' tokens."""
    log_probs_n = response_log_probs(policy, train, batch, hidden)
    num_tokens = torch.full((), log_probs_n.shape[0], dtype=torch.int64, device=hidden.device)
    return MicroBatchLoss(-log_probs_n.sum(), num_tokens)
