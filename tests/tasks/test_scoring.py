"""A scorer that raises, hangs, dies or returns nonsense costs its own reward: not the others', and not the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dppo.errors import ScoringError, TaskError
from megatron_dppo.tasks.build import build_task
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.scoring import Scorer
from megatron_dppo.tasks.task import Problem
from tests.waiting import wait_until

ORDERS = TaskConfig(name="orders", dataset="chain_sum", size=1, reward="tests.tasks.rewards_for_tests:follow_orders")
FACTORS = TaskConfig(name="factors", dataset="prime_factorization", size=4)
TIMEOUT_S = 1.0


def orders(*responses: str) -> list[tuple[Problem, str]]:
    return [(Problem(f"orders/{index}", "?"), response) for index, response in enumerate(responses)]


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer([ORDERS, FACTORS], timeout_s=TIMEOUT_S, workers=2) as scorer:
        yield scorer


def test_results_come_in_the_order_of_the_pairs(scorer: Scorer) -> None:
    rewards = [index / 200 for index in range(200)]
    results = scorer.score(orders(*(f"return {reward}" for reward in rewards)))
    assert [result.reward for result in results] == rewards
    assert all(result.failure is None for result in results)


def test_an_empty_batch_has_no_results(scorer: Scorer) -> None:
    assert scorer.score([]) == []


@pytest.mark.parametrize(
    ("response", "failure", "detail"),
    [
        ("raise oh no", "error", "RuntimeError: oh no"),
        ("quit", "error", "SystemExit"),
        ("die", "crash", "exit code 3"),
        pytest.param("hang", "timeout", "no score after 1 s", marks=pytest.mark.slow),
        pytest.param("backtrack", "timeout", "no score after 1 s", marks=pytest.mark.slow),
        ("return nan", "invalid", "nan, not in [0, 1]"),
        ("return 1.5", "invalid", "1.5, not in [0, 1]"),
        ("text good", "invalid", "'good', not a number"),
    ],
)
def test_a_failure_gives_reward_0_and_leaves_its_neighbours_alone(
    scorer: Scorer, response: str, failure: str, detail: str
) -> None:
    before = scorer.scoring_failures[failure]
    results = scorer.score(orders(*["return 0.5"] * 5, response, *["return 0.75"] * 5))
    assert [result.reward for result in results] == [0.5] * 5 + [0.0] + [0.75] * 5
    assert [result.failure for result in results] == [None] * 5 + [failure] + [None] * 5
    assert "orders/5" in str(results[5].detail)
    assert detail in str(results[5].detail)
    assert scorer.scoring_failures[failure] == before + 1


def test_a_verifier_that_raises_on_junk_is_counted(scorer: Scorer) -> None:
    """prime_factorization's own verifier converts the answer to integers without a guard."""
    problem = build_task(FACTORS)[0]
    good, junk = scorer.score([(problem, str(problem.answer)), (problem, "banana")])
    assert (good.reward, good.failure) == (1.0, None)
    assert (junk.reward, junk.failure) == (0.0, "error")


def test_a_problem_of_an_unknown_task_is_an_error_that_names_it(scorer: Scorer) -> None:
    (result,) = scorer.score([(Problem("elsewhere/0", "?"), "return 1")])
    assert (result.reward, result.failure) == (0.0, "error")
    assert "elsewhere/0" in str(result.detail)


@pytest.mark.slow
def test_processes_that_a_hanging_scorer_started_are_ended_with_it(scorer: Scorer, tmp_path: Path) -> None:
    (result,) = scorer.score(orders(f"spawn {tmp_path / 'pid'}"))
    assert result.failure == "timeout"
    assert _ends(int((tmp_path / "pid").read_text()))


@pytest.mark.slow
def test_a_scorer_that_hangs_is_not_waited_for(scorer: Scorer) -> None:
    """It never ends by itself."""
    scorer.start()
    (result,) = scorer.score(orders("hang"))
    assert result.failure == "timeout"


@pytest.mark.slow
def test_close_ends_the_workers_and_a_later_batch_starts_new_ones() -> None:
    scorer = Scorer([ORDERS], timeout_s=TIMEOUT_S)
    scorer.start()
    (worker,) = [worker.process for worker in scorer._workers]
    scorer.close()
    scorer.close()
    assert worker.poll() is not None
    assert scorer.score(orders("return 1"))[0].reward == 1.0
    scorer.close()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["note", "backtrack"], ids=["idle", "hanging"])
def test_workers_end_when_their_trainer_is_killed(tmp_path: Path, order: str) -> None:
    """Nothing may be left behind on a node after a kill -9, not even a worker that sits in C code at that moment.

    Such a worker ends by itself 5 s behind its limit (tasks/scoring_worker.py).
    """
    script = tmp_path / "trainer.py"  # it has no __main__ guard and needs none: workers do not import it
    script.write_text(
        "import signal, sys\n"
        "from megatron_dppo.tasks.config import FieldsConfig, TaskConfig\n"
        "from megatron_dppo.tasks.scoring import Scorer\n"
        "from megatron_dppo.tasks.task import Problem\n"
        f"scorer = Scorer([{ORDERS!r}], timeout_s=3)\n"
        "scorer.start()\n"
        "print(scorer._workers[0].process.pid, flush=True)\n"
        "scorer.score([(Problem('orders/0', '?'), sys.argv[1])])\n"
        "signal.pause()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    scored = tmp_path / "scored"
    command = [sys.executable, str(script), f"{order} {scored}"]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    wait_until(scored.exists, within_s=120, what=f"the order {order}")
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    assert _ends(worker, patience_s=60)


@pytest.mark.slow
def test_a_task_that_workers_cannot_build_is_an_error_and_not_a_zero() -> None:
    scorer = Scorer([TaskConfig(name="chain_sums")])
    with pytest.raises(ScoringError, match="no task 'chain_sums'; did you mean chain_sum"):
        scorer.score(orders("return 1"))
    assert scorer._workers == []


def test_scorer_refuses_settings_that_make_no_sense() -> None:
    with pytest.raises(TaskError, match="timeout must be positive"):
        Scorer([ORDERS], timeout_s=0)
    with pytest.raises(TaskError, match="at least one worker"):
        Scorer([ORDERS], workers=0)


def _ends(pid: int, patience_s: float = 10.0) -> bool:
    """Whether the process is gone, or a zombie that only waits for its parent's notice, soon."""

    def gone() -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        return state == "Z"

    return wait_until(gone, within_s=patience_s, what=f"process {pid} ends")
