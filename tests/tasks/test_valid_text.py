"""Text that cannot be encoded is refused wherever it comes from: files (test_strict_json.py), configs, generators."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.build import build_evaluation_set, build_mixture, build_task
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.task import Problem
from megatron_dppo.tasks.valid_text import check_problem_text

HALF = "\ud835"


class OneProblem:
    """A custom task whose problem is in its parameters."""

    def __init__(self, config: TaskConfig) -> None:
        self.name = config.name
        texts = {key: chr(value) if isinstance(value, int) else value for key, value in config.parameters.items()}
        self._problem = Problem(f"{config.name}/0", **{"question": "?", **texts})

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Problem:
        return self._problem

    def score(self, problem: Problem, response: str) -> float:
        return 0.0


@pytest.mark.parametrize("build", [lambda config: build_mixture([config], seed=0), lambda c: build_evaluation_set([c])])
@pytest.mark.parametrize("field", ["question", "answer"])
def test_the_problems_of_any_task_are_checked_before_they_are_used(build: Any, field: str) -> None:
    config = TaskConfig(
        name="mine", kind="custom", path="tests.tasks.test_valid_text:OneProblem", parameters={field: ord(HALF)}
    )
    with pytest.raises(TaskError, match=rf"mine/0: the {field} holds half a character"):
        build(config)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (Problem("a/0", HALF), "a/0: the question holds half a character"),
        (Problem("a/0", "x\0"), "a/0: the question holds a NUL character at position 1; remove it"),
        (Problem("a/0", "x", HALF), "a/0: the answer holds half a character"),
        (Problem("a/0", "x", None, {"system_prompt": HALF}), "a/0: the system_prompt holds half a character"),
        (Problem("a/0", "x", None, {"system_prompt": 5}), "a/0: the system_prompt must be a text, not int"),
        (Problem("a/0", 3), "a/0: the question must be a text, not int"),  # type: ignore[arg-type]
        (Problem("a/0", "x", 3), "a/0: the answer must be a text, not int"),  # type: ignore[arg-type]
    ],
)
def test_a_problem_that_cannot_be_encoded_is_named(problem: Problem, message: str) -> None:
    with pytest.raises(TaskError) as error:
        check_problem_text(problem)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"prompt_template": f"{{question}}{HALF}"}, "prompt_template"),
        ({"system_prompt": HALF}, "system_prompt"),
        ({"system_prompt": "a\0"}, "system_prompt"),
        ({"parameters": {"min_terms": [HALF]}}, "parameters.min_terms"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(TaskError, match=f"task chain_sum: {field} holds"):
        build_task(TaskConfig(name="chain_sum", **settings))
