"""One exchange after generating and scoring: whatever happened to one replica, all ranks know it and take the same branch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core import parallel_state

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel, replica_group
from megatron_dppo.errors import RolloutError, ScoringError, StoppedWaitingError
from megatron_dppo.rollout.engine import ServerLoad
from megatron_dppo.rollout.sample import FailedSample, Prompt, Sample, SamplingParams
from megatron_dppo.tasks.scoring import ScoreResult
from megatron_dppo.training.config.schema import Config, EvalConfig, RolloutConfig
from megatron_dppo.training.exchange import Report, SampleReport
from megatron_dppo.training.rollouts import RolloutPhase
from tests.rank_pool import RankPools

PROMPTS, SAMPLES = 5, 2


def prompt(index: int) -> Prompt:
    return Prompt(f"p/{index}", tuple(range(1, index + 2)), {"problem": index})


class Engine:
    """Responses of known lengths. What goes wrong cannot be had from a real engine at will, so it is made up."""

    ranks_generate_together = False

    def __init__(self, fails: str | None) -> None:
        self.fails = fails

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Sample | FailedSample]:
        if self.fails == "no server":
            raise RolloutError("no SGLang server is left")
        if self.fails == "stop":
            raise StoppedWaitingError("SIGTERM amid rollouts, which were given up")
        if self.fails == "memory":
            raise MemoryError("too much")
        made: list[Sample | FailedSample] = []
        for group, asked in enumerate(prompts):
            for index in range(sampling.samples_per_prompt):
                if self.fails == "one sample" and group == index == 0:
                    made.append(FailedSample(asked, f"sample of {asked.prompt_id}: its log-prob is null", group))
                else:
                    length = len(asked.token_ids) + index
                    made.append(Sample(asked, [7] * length, [-1.0] * length, "stop", [(3, length)], group_id=group))
        return made

    def server_loads(self) -> dict[str, ServerLoad]:
        replica = parallel_state.get_data_parallel_rank()
        return {"http://a": ServerLoad(None if replica else 5, 10.0), "http://b": ServerLoad(replica, 1.0 + replica)}


class Grader:
    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def score(self, pairs: list[tuple[Any, str]]) -> list[ScoreResult]:
        if self.fails:
            raise ScoringError("no scoring worker can be started")
        return [ScoreResult(problem / 8) for problem, _ in pairs]


def _collect(
    layout: dict[str, int], fails: str | None, on_replica: int, max_failed_share: float, evaluate: bool = False
) -> tuple[Any, ...]:
    """On a rank: what ``collect`` said, or (class, message) of what it raised."""
    initialize_model_parallel(ParallelConfig(**layout), seed=1)
    mine = fails if parallel_state.get_data_parallel_rank() == on_replica else None
    config = Config(
        rollout=RolloutConfig(prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES, max_failed_share=max_failed_share),
        eval=EvalConfig(samples_per_prompt=SAMPLES),
    )
    inputs = SimpleNamespace(
        stop_token_ids=(2,),
        encoder=SimpleNamespace(decode=str),
        train_prompts=lambda first, count, share, shares: [
            prompt(i) for i in range(first + share, first + count, shares)
        ],
        eval_prompts=[prompt(i) for i in range(PROMPTS)],
    )
    phase = RolloutPhase(
        config,
        inputs,
        engine=Engine(mine),
        scorer=Grader(mine == "no scorer"),
        replica_group=replica_group(),
    )
    try:
        if evaluate:
            return (phase.evaluate(),)
        rollouts = phase.collect(first_prompt=0, step=0)
    except Exception as error:
        return type(error).__name__, str(error)
    return (
        [tuple(report) for report in rollouts.reports],
        dict(rollouts.sources),
        sorted(rollouts.own),
        rollouts.failed,
        list(rollouts.reasons),
        dict(rollouts.server_loads),
    )


def expected_reports(*missing: int) -> list[tuple[Any, ...]]:
    """Prompt i has i + 1 tokens, and its j-th response one more for every j."""
    return [
        (number, i + 1, i + 1 + j, i / 8, False, False, 3, 0)
        for i in range(PROMPTS)
        for j in range(SAMPLES)
        if (number := i * SAMPLES + j) not in missing
    ]


@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}], ids=str)
def test_all_ranks_know_every_sample_and_the_first_of_each_replica_has_its_own(
    ranks: RankPools, layout: dict[str, int]
) -> None:
    first, second = ranks(2).run(_collect, layout, None, 0, 0.0)
    assert first[0] == second[0] == expected_reports()
    assert first[1] == second[1]
    assert first[5] == second[5]
    if layout:  # one replica
        assert set(first[1].values()) == {0}
        assert (first[2], second[2]) == (list(range(10)), [])
        assert first[5] == {"http://a": ServerLoad(5, 10.0), "http://b": ServerLoad(0, 1.0)}
    else:  # three prompts here, two there
        assert first[2] == [0, 1, 4, 5, 8, 9]
        assert second[2] == [2, 3, 6, 7]
        assert all(first[1][number] == (number // 2) % 2 for number in range(10))
        # One queue, seen by both; tokens, of each its own.
        assert first[5] == {"http://a": ServerLoad(5, 20.0), "http://b": ServerLoad(1, 3.0)}


@pytest.mark.parametrize("replica", [0, 1])
def test_one_bad_sample_costs_that_sample(ranks: RankPools, replica: int) -> None:
    for reports, _, own, failed, reasons, _ in ranks(2).run(_collect, {}, "one sample", replica, 0.1):
        assert reports == expected_reports(replica * SAMPLES)
        assert replica * SAMPLES not in own
        assert (failed, reasons) == (1, [f"sample of p/{replica}: its log-prob is null"])


@pytest.mark.parametrize("fails", ["no server", "no scorer"])
@pytest.mark.parametrize("replica", [0, 1])
def test_a_replica_that_has_nothing_stops_the_run_only_where_too_little_is_left(
    ranks: RankPools, fails: str, replica: int
) -> None:
    lost = {0: [0, 1, 4, 5, 8, 9], 1: [2, 3, 6, 7]}[replica]
    for reports, _, _, failed, reasons, _ in ranks(2).run(_collect, {}, fails, replica, 0.6):
        assert reports == expected_reports(*lost)
        assert failed == len(lost)
        assert len(reasons) == 1
    first, second = ranks(2).run(_collect, {}, fails, replica, 0.1)
    assert first == second
    assert first[0] == "RolloutError"
    assert f"{len(lost)} of 10 samples cannot be used, more than rollout.max_failed_share = 0.1" in first[1]
    assert ("no SGLang server is left" if fails == "no server" else "no scoring worker") in first[1]


@pytest.mark.parametrize("replica", [0, 1])
def test_any_other_error_stops_all_ranks_whatever_share_failed(ranks: RankPools, replica: int) -> None:
    first, second = ranks(2).run(_collect, {}, "memory", replica, 0.9)
    assert (
        first == second == ("RolloutError", f"rank {replica} (replica {replica}) cannot go on: MemoryError: too much")
    )


@pytest.mark.parametrize("evaluate", [False, True])
def test_responses_that_one_replica_gave_up_are_given_up_by_all(ranks: RankPools, evaluate: bool) -> None:
    first, second = ranks(2).run(_collect, {}, "stop", 1, 0.9, evaluate)
    assert first == second == ("StoppedWaitingError", "SIGTERM amid rollouts, which were given up")


def test_an_evaluation_counts_what_all_replicas_have(ranks: RankPools) -> None:
    first, second = ranks(2).run(_collect, {}, None, 0, 0.0, True)
    assert first == second == ({"eval/accuracy": 0.0, "eval/reward_mean": pytest.approx(2 / 8)},)
    first, second = ranks(2).run(_collect, {}, "no server", 1, 0.0, True)
    assert first == second
    assert first[0] == "RolloutError"


def test_a_report_comes_through_as_it_was() -> None:
    samples = (SampleReport(2**40, 3, 5, 0.1, True, False, 9, 4), SampleReport(1, 1, 1, 1.0, False, True, 0))
    for report in (
        Report(1),
        Report(3, samples, failed=2, reasons=("a\nb", "ü\u2028"), scoring_failures=1),
        Report(1, server_loads={"http://a": (None, 0.1), "http://b": (3, 1e9)}),
        Report(0, error="MemoryError: \ud800"),
    ):
        assert Report.from_bytes(report.to_bytes()) == report


def test_a_report_stays_small_however_much_failed() -> None:
    report = Report.from_bytes(Report(0, failed=10_000, reasons=("x" * 10**6,) * 10_000).to_bytes())
    assert report.failed == 10_000
    assert sum(map(len, report.reasons)) <= 20_000
