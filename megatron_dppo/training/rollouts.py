"""Generate and score: from prompts to samples with rewards on each replica's first rank, and what all ranks know of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dppo.errors import RolloutError, ScoringError, StoppedWaitingError
from megatron_dppo.rollout.engine import RolloutEngine, ServerLoad
from megatron_dppo.rollout.sample import FailedSample, Prompt, Sample, SamplingParams
from megatron_dppo.tasks.scoring import Scorer
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.exchange import Report, SampleReport, exchange
from megatron_dppo.training.inputs import RunInputs

# Verifiers give 1 to a right answer; some give partial credit below that, which does not count as right.
CORRECT = 1.0 - 1e-6


@dataclass(frozen=True)
class ScoredSample:
    """A sample with its reward, and its response as text."""

    sample: Sample
    response: str


@dataclass(frozen=True)
class Rollouts:
    """The samples of one batch of prompts.

    Attributes:
        reports: of the usable samples of all replicas, by their numbers. The same on every rank.
        sources: number -> the replica that has the sample. The same on every rank.
        own: number -> the sample itself, of this replica and on its first rank; empty elsewhere.
        failed: how many samples of all replicas cannot be used.
        reasons: why, for some of them.
        scoring_failures: responses whose scorer raised, timed out or died (their reward is 0).
        stop: why the run is to stop once the step is done; None: it is not. The same on every rank.
        save: whether a checkpoint is to be written then. The same on every rank.
        server_loads: of the engine's servers, over all replicas. The same on every rank.
        seconds: that this rank took to generate and to score, where it has samples: without waiting for others.
    """

    reports: Sequence[SampleReport]
    sources: Mapping[int, int]
    own: Mapping[int, ScoredSample]
    failed: int
    reasons: Sequence[str]
    scoring_failures: int
    stop: str | None
    save: bool
    server_loads: Mapping[str, ServerLoad]
    seconds: Mapping[str, float]


class RolloutPhase:
    """Owns the way from prompts to scored samples. Every method is collective over all ranks.

    What goes wrong with one sample costs that sample. All ranks raise RolloutError, the same one, if more samples failed than
    ``rollout.max_failed_share``, if none is left, or if anything else went wrong on any rank; or StoppedWaitingError, if any
    replica's engine gave up waiting because the run is to stop. But for one thing: where ranks
    generate together, a rank that fails amid it raises its own error, as nobody would hear its report.
    """

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
        self._is_leader = dist.get_rank(replica_group) == 0
        self._replica = parallel_state.get_data_parallel_rank()
        self._replicas = parallel_state.get_data_parallel_world_size()
        self._prompts_per_step = config.rollout.prompts_per_step
        self._max_failed_share = config.rollout.max_failed_share
        self._log_prob_floor = config.rollout.log_prob_floor
        self._sampling, self._eval_sampling = sampling_params(config, inputs.stop_token_ids)

    def collect(
        self, *, first_prompt: int, step: int, stop: Callable[[], str | None] = lambda: None, save: bool = False
    ) -> Rollouts:
        """Sample and score responses to a step's prompts.

        Args:
            first_prompt: position of the step's first prompt in the stream of training prompts.
            step: steps completed before; no two steps draw with the same random numbers.
            stop: asked after generating and scoring: why this rank wants the run to stop, or None.
            save: whether this rank wants a checkpoint.
        """
        prompts = self._inputs.train_prompts(first_prompt, self._prompts_per_step, self._replica, self._replicas)
        sampling = replace(self._sampling, seed=self._sampling.seed * 1_000_003 + step)
        return self._generate_and_score(prompts, sampling, stop, save)

    def evaluate(self) -> dict[str, float]:
        """Share of right answers and mean reward on the held-out prompts: the same prompts and random seed every time."""
        prompts = self._inputs.eval_prompts[self._replica :: self._replicas]
        rollouts = self._generate_and_score(prompts, self._eval_sampling)
        rewards = [report.reward for report in rollouts.reports]
        return {
            "eval/accuracy": sum(reward >= CORRECT for reward in rewards) / len(rewards),
            "eval/reward_mean": sum(rewards) / len(rewards),
        }

    def token_texts(self, response_ids: Sequence[int]) -> list[str]:
        """What each token of a response adds to its text: nothing, where it is special or a part of a character only."""
        return self._inputs.encoder.decode_each(response_ids)

    def _generate_and_score(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        stop: Callable[[], str | None] = lambda: None,
        save: bool = False,
    ) -> Rollouts:
        own: dict[int, ScoredSample] = {}
        made: Sequence[Sample | FailedSample] | None = None
        cause: Exception | None = None
        began = generated = time.perf_counter()
        try:
            made = self.engine.generate(prompts, sampling)
            generated = time.perf_counter()
            own, report = self._score(made if self._is_leader else [], sampling.samples_per_prompt)
        except Exception as error:
            if made is None and self.engine.ranks_generate_together and not isinstance(error, RolloutError):
                raise  # others wait amid generating, not for a report: the lifeline ends them
            cause = error
            report = self._failure(error, asked=len(prompts) * sampling.samples_per_prompt)
        seconds = {"generate": generated - began, "score": time.perf_counter() - generated} if self._is_leader else {}
        reports = exchange(replace(report, stop=stop(), save=save))
        if (reason := self._reason_to_stop(reports)) is not None:
            raise reason from cause
        return _rollouts(reports, own, seconds)

    def _score(
        self, made: Sequence[Sample | FailedSample], samples_per_prompt: int
    ) -> tuple[dict[int, ScoredSample], Report]:
        """The samples with their rewards, by number, and what there is to report of them."""
        usable: dict[int, ScoredSample] = {}
        failed: list[FailedSample] = []
        for index, sample in enumerate(made):
            if isinstance(sample, FailedSample):
                failed.append(sample)
            else:
                prompt, position = divmod(index, samples_per_prompt)
                number = (self._replica + prompt * self._replicas) * samples_per_prompt + position
                usable[number] = ScoredSample(sample, self._inputs.encoder.decode(sample.response_ids))
        results = self._scorer.score([(s.sample.prompt.metadata["problem"], s.response) for s in usable.values()])
        for scored, result in zip(usable.values(), results, strict=True):
            scored.sample.reward = result.reward
        return usable, Report(
            self._replica,
            samples=tuple(_report(number, scored.sample, self._log_prob_floor) for number, scored in usable.items()),
            failed=len(failed),
            reasons=tuple(sample.reason for sample in failed),
            scoring_failures=sum(result.failure is not None for result in results),
            server_loads=self._server_loads(),
        )

    def _server_loads(self) -> dict[str, tuple[int | None, float]]:
        if not self._is_leader:
            return {}
        return {url: (load.queue_depth_max, load.tokens_per_s) for url, load in self.engine.server_loads().items()}

    def _failure(self, error: Exception, asked: int) -> Report:
        """A replica without a server or a scorer has lost its samples; the others may have enough. All else is an error."""
        if isinstance(error, StoppedWaitingError):
            return Report(self._replica, given_up=str(error))
        if self._is_leader and isinstance(error, (RolloutError, ScoringError)):
            return Report(self._replica, failed=asked, reasons=(str(error),))
        return Report(self._replica, error=f"{type(error).__name__}: {error}")

    def _reason_to_stop(self, reports: Sequence[Report]) -> RolloutError | None:
        """The same on every rank."""
        for rank, report in enumerate(reports):
            if report.error is not None:
                return RolloutError(f"rank {rank} (replica {report.replica}) cannot go on: {report.error}")
        if (given_up := next((report.given_up for report in reports if report.given_up), None)) is not None:
            return StoppedWaitingError(given_up)
        failed = sum(report.failed for report in reports)
        usable = sum(len(report.samples) for report in reports)
        if usable and failed <= self._max_failed_share * (failed + usable):
            return None
        reason = next((reason for report in reports for reason in report.reasons), "no prompt was asked")
        return RolloutError(
            f"{failed} of {failed + usable} samples cannot be used, more than rollout.max_failed_share ="
            f" {self._max_failed_share:g} allows; the first: {reason}"
        )


def _rollouts(reports: Sequence[Report], own: Mapping[int, ScoredSample], seconds: Mapping[str, float]) -> Rollouts:
    source = {sample.number: report.replica for report in reports for sample in report.samples}
    return Rollouts(
        reports=sorted(sample for report in reports for sample in report.samples),
        sources=source,
        own=own,
        failed=sum(report.failed for report in reports),
        reasons=[reason for report in reports for reason in report.reasons],
        scoring_failures=sum(report.scoring_failures for report in reports),
        stop=next((report.stop for report in reports if report.stop is not None), None),
        save=any(report.save for report in reports),
        server_loads=_loads_over_replicas(reports),
        seconds=seconds,
    )


def _loads_over_replicas(reports: Sequence[Report]) -> dict[str, ServerLoad]:
    """All replicas see the same queue of a server, and each of them some of its tokens."""
    found: dict[str, list[tuple[int | None, float]]] = {}
    for report in reports:
        for url, load in report.server_loads.items():
            found.setdefault(url, []).append(load)
    return {
        url: ServerLoad(
            max((queue for queue, _ in loads if queue is not None), default=None), sum(tokens for _, tokens in loads)
        )
        for url, loads in found.items()
    }


def _report(number: int, sample: Sample, log_prob_floor: float) -> SampleReport:
    return SampleReport(
        number=number,
        prompt_tokens=len(sample.prompt.token_ids),
        response_tokens=len(sample.response_ids),
        reward=float(sample.reward or 0.0),
        was_cut=sample.finish_reason == "length",
        was_aborted=sample.finish_reason == "abort",
        oldest_weight_version=sample.oldest_weight_version,
        faulty_tokens=sum(log_prob < log_prob_floor for log_prob in sample.rollout_log_probs),
    )


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
