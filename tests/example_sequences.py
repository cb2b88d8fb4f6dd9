"""Eight sequences to learn from, for tests of the trainer's optimizer step."""

from __future__ import annotations

import torch

from megatron_dppo.training.data.micro_batch import TrainingExample


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
                token_ids=ids,
                prompt_length=prompt,
                advantage=float(torch.randn((), generator=generator)),
                rollout_log_probs=sampled,
                topk_ids=topk_ids,
                topk_log_probs=log_probs,
            )
        )
    return made
