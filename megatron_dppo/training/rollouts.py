"""Generate and score: from prompts to samples with rewards, the same on every rank of a model replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dppo.distributed.collectives import on_one_rank, sum_over_ranks
from megatron_dppo.rollout.engine import RolloutEngine
from megatron_dppo.rollout.sample import Prompt, Sample, SamplingParams
from megatron_dppo.tasks.scoring import Scorer
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.inputs import RunInputs

# Verifiers give 1 to a right answer; some give partial credit below that, which does not count as right.
CORRECT = 1.0 - 1e-6


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
    """Owns the way from prompts to scored samples. Every method is collective over all ranks."""

    def __init__(
        self,
        config: Config,
        inputs: RunInputs,
        *,
        engine: RolloutEngine,
        scorer: Scorer,
        replica_group: dist.ProcessGroup,
    ) -> None:
        self.engine = engine
        self._inputs = inputs
        self._scorer = scorer
        self._replica_group = replica_group
        self._prompts_per_step = config.rollout.prompts_per_step
        self._sampling, self._eval_sampling = sampling_params(config, inputs.stop_token_ids)

    def collect(self, *, first_prompt: int, step: int) -> ScoredRollouts:
        """Sample and score responses to this replica's share of a step's prompts.

        Args:
            first_prompt: position of the step's first prompt in the stream of training prompts.
            step: steps completed before; no two steps draw with the same random numbers.
        """
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        prompts = self._inputs.train_prompts(first_prompt, self._prompts_per_step, replica, replicas)
        return self._generate_and_score(prompts, replace(self._sampling, seed=self._sampling.seed * 1_000_003 + step))

    def evaluate(self) -> dict[str, float]:
        """Share of right answers and mean reward on the held-out prompts: the same prompts and random seed every time."""
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        rollouts = self._generate_and_score(self._inputs.eval_prompts[replica::replicas], self._eval_sampling)
        rewards = [float(sample.reward or 0.0) for sample in rollouts.samples]
        right, reward, count = sum_over_ranks(
            [sum(r >= CORRECT for r in rewards), sum(rewards), len(rewards)],
            group=parallel_state.get_data_parallel_group(),
        )
        return {"eval/accuracy": right / count, "eval/reward_mean": reward / count}

    def _generate_and_score(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> ScoredRollouts:
        samples = self.engine.generate(prompts, sampling)
        responses = [self._inputs.encoder.decode(sample.response_ids) for sample in samples]
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

        return on_one_rank(score, group=self._replica_group)


def sampling_params(config: Config, stop_token_ids: tuple[int, ...]) -> tuple[SamplingParams, SamplingParams]:
    """How training samples are drawn, but for the step's seed, and how held-out ones are."""
    algorithm, rollout = config.algorithm, config.rollout
    training = SamplingParams(
        max_new_tokens=rollout.max_response_tokens,
        temperature=algorithm.loss.temperature,
        samples_per_prompt=rollout.samples_per_prompt,
        stop_token_ids=stop_token_ids,
        topk_log_probs=algorithm.topk if algorithm.loss.needs_topk else 0,
        return_routed_experts=algorithm.routing_replay,
        seed=config.run.seed,
    )
    held_out = SamplingParams(
        max_new_tokens=rollout.max_response_tokens,
        temperature=config.eval.temperature,
        samples_per_prompt=config.eval.samples_per_prompt,
        stop_token_ids=stop_token_ids,
        seed=config.run.seed,
    )
    return training, held_out
