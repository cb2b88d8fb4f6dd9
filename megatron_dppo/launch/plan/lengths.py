"""Lengths of the sequences of a rollout batch, before there are any."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dppo.training.config.schema import RolloutConfig


@dataclass(frozen=True)
class Lengths:
    """Response lengths are log-normal, with a part that a prompt's responses share, cut at the longest that may be.

    Attributes:
        median: response tokens; 0: a quarter of ``rollout.max_response_tokens``.
        sigma: of the logarithm, among responses to a prompt.
        prompt_sigma: of the logarithm, among prompts.
        prompt_tokens: of every prompt.
    """

    median: float
    sigma: float
    prompt_sigma: float
    prompt_tokens: int

    def draw(self, rollout: RolloutConfig, generator: torch.Generator) -> dict[int, int]:
        """Tokens of each sequence of a rollout batch, prompt and response, by number."""
        prompts, samples = rollout.prompts_per_step, rollout.samples_per_prompt
        median = self.median or rollout.max_response_tokens / 4
        shared = self.prompt_sigma * torch.randn(prompts, 1, generator=generator)
        own = self.sigma * torch.randn(prompts, samples, generator=generator)
        responses = (median * (shared + own).exp()).flatten().long()
        return self.with_prompts(responses, rollout)

    def with_prompts(self, responses: torch.Tensor, rollout: RolloutConfig) -> dict[int, int]:
        """Those of given responses, [n] tokens each."""
        prompt = min(self.prompt_tokens, rollout.max_prompt_tokens)
        return dict(enumerate((responses.clamp(1, rollout.max_response_tokens) + prompt).tolist()))
