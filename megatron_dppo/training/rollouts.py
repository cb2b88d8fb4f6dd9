"""Generate and score: from prompts to samples with rewards, the same on every rank of a model replica."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_dppo.distributed.collectives import on_one_rank
from megatron_dppo.rollout.engine import RolloutEngine
from megatron_dppo.rollout.sample import Prompt, Sample, SamplingParams
from megatron_dppo.tasks.scoring import Scorer


@dataclass(frozen=True)
class ScoredRollouts:
    """This replica's samples of one batch.

    Attributes:
        samples: with rewards; those of one prompt are adjacent.
        responses: their decoded texts.
        scoring_failures: responses whose scorer raised, timed out or died (their reward is 0).
    """

    samples: list[Sample]
    responses: list[str]
    scoring_failures: int


class RolloutPhase:
    """Owns the way from prompts to scored samples. Every method is collective over the replica."""

    def __init__(
        self,
        engine: RolloutEngine,
        scorer: Scorer,
        decode: Callable[[Sequence[int]], str],
        replica_group: dist.ProcessGroup,
    ) -> None:
        self.engine = engine
        self._scorer = scorer
        self._decode = decode
        self._group = replica_group

    def collect(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> ScoredRollouts:
        """Sample and score responses to this replica's prompts."""
        samples = self.engine.generate(prompts, sampling)
        for sample in samples:
            sample.check()
        responses = [self._decode(sample.response_ids) for sample in samples]
        rewards, failures = self._score(samples, responses)
        for sample, reward in zip(samples, rewards, strict=True):
            sample.reward = reward
        return ScoredRollouts(samples, responses, failures)

    def _score(self, samples: Sequence[Sample], responses: Sequence[str]) -> tuple[list[float], int]:
        """Grade on one rank only: a scorer need not be deterministic or cheap, the ranks must agree all the same."""
        pairs = [(sample.prompt.metadata["problem"], text) for sample, text in zip(samples, responses, strict=True)]

        def score() -> tuple[list[float], int]:
            results = self._scorer.score(pairs)
            return [result.reward for result in results], sum(result.failure is not None for result in results)

        return on_one_rank(score, group=self._group)
