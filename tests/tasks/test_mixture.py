"""The training stream: resumable, in the proportions asked for, and clear of the evaluation set."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.build import build_evaluation_set, build_mixture
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.held_out import question_key

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # a space of 200 questions


def sums(**changes: Any) -> TaskConfig:
    return TaskConfig(**{"name": "chain_sum", "parameters": ONE_DIGIT, "size": 300, **changes})


def words(**changes: Any) -> TaskConfig:
    return TaskConfig(**{"name": "spell_backward", "size": 50, **changes})


def test_a_position_gives_its_problem_in_whatever_order_one_asks() -> None:
    straight = build_mixture([sums(), words()], seed=5)
    resumed = build_mixture([sums(), words()], seed=5)
    problems = straight.problems(0, 2100)  # past the first block, and through spell_backward many times
    assert resumed.problems(1500, 20) == problems[1500:1520]
    assert resumed.problem(3) == problems[3]
    assert build_mixture([sums(), words()], seed=6).problems(0, 20) != problems[:20]


def test_weights_are_kept_exactly_in_every_block() -> None:
    mixture = build_mixture([sums(weight=3.0), words(weight=1.0)], seed=0)
    for block in range(2):
        counts = Counter(problem.task_name for problem in mixture.problems(1000 * block, 1000))
        assert abs(counts["chain_sum"] - 750) <= 1  # the one position that every task has for certain may round away


def test_a_task_of_tiny_weight_still_appears() -> None:
    mixture = build_mixture([sums(weight=1e6), words(weight=1.0)], seed=0)
    assert Counter(problem.task_name for problem in mixture.problems(0, 1000))["spell_backward"] == 1


def test_a_task_is_gone_through_before_any_problem_returns() -> None:
    mixture = build_mixture([words(size=40)], seed=0)
    first, second = mixture.problems(0, 40), mixture.problems(40, 40)
    assert len({problem.problem_id for problem in first}) == 40
    assert {problem.problem_id for problem in second} == {problem.problem_id for problem in first}
    assert first != second


def test_no_training_question_is_an_evaluation_question() -> None:
    """Even where the generator knows few questions, so that training would repeat most of them."""
    evaluation = build_evaluation_set([sums(size=60, seed=10)])
    unguarded = build_mixture([sums()], seed=0).problems(0, 600)
    assert any(problem in evaluation for problem in unguarded)  # else this test would prove nothing
    guarded = build_mixture([sums()], seed=0, held_out=evaluation).problems(0, 600)
    asked = {question_key(problem.question) for problem in evaluation.problems}
    assert not asked & {question_key(problem.question) for problem in guarded}


def test_the_evaluation_set_has_every_question_once() -> None:
    evaluation = build_evaluation_set([sums(size=300)])
    questions = [problem.question for problem in evaluation.problems]
    assert len(set(questions)) == len(questions) == 300 - evaluation.repeated
    assert evaluation.repeated > 0


def test_questions_that_differ_in_space_and_case_only_are_the_same() -> None:
    assert question_key(" What is\n2 + 3? ") == question_key("what is 2 + 3?")
    assert question_key("2 + 3") != question_key("3 + 2")


def test_a_task_with_nothing_left_to_train_on_is_an_error_at_once() -> None:
    evaluation = build_evaluation_set([sums()])
    with pytest.raises(TaskError, match="task chain_sum: none of its 300 problems may be trained on"):
        build_mixture([sums()], seed=0, held_out=evaluation)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "at least one task"),
        ([sums(), sums()], "two tasks are called chain_sum"),
        ([sums(weight=0.0)], "weight must be a positive number, not 0.0"),
        ([sums(weight=float("nan"))], "weight must be a positive number, not nan"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(configs: list[TaskConfig], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_mixture(configs, seed=0)
