"""Eight sequences to learn from, for tests of the trainer's optimizer step."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_dppo.training.data.batcher import ReplicaBatch
from megatron_dppo.training.data.micro_batch import ExampleFields, TrainingExample
from megatron_dppo.training.policy.dppo_step import DPPOStep


def examples() -> list[TrainingExample]:
    """Eight sequences of different lengths whose rollout policy is a perturbed guess, so that some tokens are masked."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(8):
        prompt, response = 3 + index % 3, 2 + 2 * index
        ids = torch.randint(0, 250, (prompt + response,), generator=generator).tolist()
        topk_ids = torch.stack([torch.randperm(250, generator=generator)[:5] for _ in range(response)])
        topk_ids[::2, 0] = torch.tensor(ids[prompt:])[::2]  # every other sampled token is inside the top K
        log_probs = -5.5 + 0.5 * torch.randn(response, 5, generator=generator)
        sampled = torch.where((topk_ids == torch.tensor(ids[prompt:])[:, None]).any(-1), log_probs[:, 0], -6.0)
        made.append(
            TrainingExample(
                token_ids=torch.tensor(ids),
                prompt_length=prompt,
                advantage=float(torch.randn((), generator=generator)),
                rollout_log_probs=sampled,
                topk_ids=topk_ids,
                topk_log_probs=log_probs,
            )
        )
    return made


def replica_batch(step: DPPOStep, examples: list[TrainingExample], optimizer_steps: int) -> ReplicaBatch:
    """This replica's part of examples that all ranks have."""
    schedules = step.scheduler.schedules({n: len(e.token_ids) for n, e in enumerate(examples)}, optimizer_steps)
    first = examples[0]
    fields = ExampleFields(
        rollout_log_probs=first.rollout_log_probs is not None,
        topk=0 if first.topk_ids is None else first.topk_ids.shape[1],
        routed_experts=None if first.routed_experts is None else tuple(first.routed_experts.shape[1:]),
    )
    replica = parallel_state.get_data_parallel_rank()
    return ReplicaBatch([s.replicas[replica] for s in schedules], dict(enumerate(examples)), fields)
