"""reasoning-gym tasks: deterministic problems, the library's scores, and errors that say what to write instead."""

from __future__ import annotations

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.reasoning_gym_task import ReasoningGymTask

TWO_DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_the_same_arguments_give_the_same_problems() -> None:
    first, second = (ReasoningGymTask("chain_sum", TWO_DIGITS, size=20, seed=3) for _ in range(2))
    assert [first[index] for index in range(20)] == [second[index] for index in range(20)]
    other = ReasoningGymTask("chain_sum", TWO_DIGITS, size=20, seed=1000)
    assert [first[index].question for index in range(20)] != [other[index].question for index in range(20)]


def test_the_reference_answer_scores_1_and_a_wrong_one_less() -> None:
    task = ReasoningGymTask("sums", TWO_DIGITS, dataset="chain_sum", size=5)
    for index in range(len(task)):
        problem = task[index]
        assert problem.problem_id == f"sums/{index}"
        assert problem.task_name == "sums"
        assert task.score(problem, f" {problem.answer}\n") == 1.0
        assert task.score(problem, str(int(str(problem.answer)) + 1)) < 0.1
        assert task.score(problem, "") == 0.0


def test_answer_extraction_reads_a_chatty_response() -> None:
    task = ReasoningGymTask("chain_sum", TWO_DIGITS, answer_extraction="tag")
    assert task.score(task[0], f"Easy. <answer>{task[0].answer}</answer>") == 1.0
    assert task.score(task[0], str(task[0].answer)) == 0.0


def test_a_task_is_finite() -> None:
    task = ReasoningGymTask("chain_sum", size=3)
    assert len(task) == 3
    assert len(list(task)) == 3
    with pytest.raises(IndexError, match="has 3 problems"):
        task[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "chain_sums"}, "no task 'chain_sums'; did you mean chain_sum"),
        ({"name": "zzzz"}, "no task 'zzzz'$"),
        ({"name": "chain_sum", "parameters": {"min_term": 2}}, "no parameter 'min_term'; did you mean min_terms"),
        ({"name": "chain_sum", "parameters": {"min_terms": 0}}, r"refuses the parameters \{'min_terms': 0\}"),
        ({"name": "chain_sum", "parameters": {"min_terms": "two"}}, "refuses the parameters"),
        ({"name": "chain_sum", "parameters": {"size": 3}}, "set size on the task"),
        ({"name": "chain_sum", "size": 0}, "size must be at least 1"),
        ({"name": "chain_sum", "answer_extraction": "last"}, "answer_extraction 'last' is unknown"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(arguments: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        ReasoningGymTask(**arguments)
