"""A reward function by dotted path: loaded with clear errors, called with everything a grader may want."""

from __future__ import annotations

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.custom_reward import CustomRewardTask, check_reward, load_reward_function
from megatron_dppo.tasks.reasoning_gym_task import ReasoningGymTask
from megatron_dppo.tasks.task import Problem

HERE = "tests.tasks.rewards_for_tests"


@pytest.mark.parametrize("path", [f"{HERE}:follow_orders", f"{HERE}.follow_orders"])
def test_the_function_grades_instead_of_the_task(path: str) -> None:
    problems = ReasoningGymTask("chain_sum", size=3)
    task = CustomRewardTask(problems, path, answer_extraction="tag")
    assert (task.name, len(task), task[1]) == ("chain_sum", 3, problems[1])
    assert task.score(task[0], "<answer>return 0.25</answer>") == 0.25


def test_the_function_gets_question_response_answer_and_metadata() -> None:
    task = CustomRewardTask(ReasoningGymTask("chain_sum", size=1), "builtins:dict")
    problem = Problem("chain_sum/0", "2 + 2 =", "4", {"level": 1})
    assert task.score(problem, " 5 ") == {
        "question": "2 + 2 =",
        "response": "5",
        "answer": "4",
        "metadata": {"level": 1},
    }


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("reward", "no dotted path; write package.module:function"),
        ("no_such_package.rewards:f", "importing no_such_package.rewards failed with ModuleNotFoundError"),
        (f"{HERE}:missing", f"the module {HERE} has no missing"),
        (f"{HERE}:not_a_function", "is a int, not a function"),
        (f"{HERE}:needs_other_arguments", "cannot be called"),
    ],
)
def test_a_function_that_cannot_be_used_is_an_error_when_loaded(path: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_reward_function(path)


@pytest.mark.parametrize("reward", [0, 0.5, True, "0.25"])
def test_rewards_are_numbers_in_the_unit_interval(reward: object) -> None:
    assert 0.0 <= check_reward(reward) <= 1.0


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -0.1, 1.0001, None, "good"])
def test_anything_else_is_refused_and_not_clipped(reward: object) -> None:
    with pytest.raises(ValueError, match="the reward is"):
        check_reward(reward)
