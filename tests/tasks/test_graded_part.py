"""A thinking model is graded by what it says after its thoughts, in every kind of task and by every reward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.build import build_task, tasks_by_name
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.task import Problem


class Echo:
    """A custom task: a response is right if it is \"42\"."""

    def __init__(self, config: TaskConfig) -> None:
        self.name = config.name

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Problem:
        return Problem(f"{self.name}/{index}", "42?", "42")

    def score(self, problem: Problem, response: str) -> float:
        return float("42" in response)


def contains_the_answer(question: str, response: str, answer: str | None, metadata: dict) -> float:
    return float(str(answer) in response)


HERE = "tests.tasks.test_graded_part"
CONFIGS = {
    "reasoning_gym": TaskConfig(name="chain_sum", size=1, graded_part="after_thinking"),
    "jsonl": TaskConfig(name="file", kind="jsonl", graded_part="after_thinking", answer_extraction="last_number"),
    "custom": TaskConfig(name="mine", kind="custom", path=f"{HERE}:Echo", graded_part="after_thinking"),
    "reward": TaskConfig(name="chain_sum", size=1, reward=f"{HERE}:contains_the_answer", graded_part="after_thinking"),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>Hm, 7.</think>\n\n{answer}", 1.0),
        ("Hm, 7.</think>{answer}", 1.0),  # the prompt may have opened the thoughts
        ("{answer}</think>7", 0.0),
        ("<think>{answer}", 0.0),  # it never stopped thinking
        ("{answer}", 0.0),
        ("</think>{answer}</think>7", 0.0),  # the last one counts
        ("</think>7</think>{answer}", 1.0),
        ("{answer}</think>", 0.0),
        ("", 0.0),
    ],
)
def test_only_what_follows_the_thoughts_is_graded(kind: str, response: str, reward: float, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    if kind == "jsonl":
        path = tmp_path / "p.jsonl"
        path.write_text(json.dumps({"question": "42?", "answer": 42}))
        config = TaskConfig(**{**vars(config), "path": str(path)})
    task = build_task(config)
    assert (task.name, len(task)) == (config.name, 1)
    problem = task[0]
    assert (task.score(problem, response.format(answer=problem.answer)) == 1.0) == (reward == 1.0)


def test_everything_is_graded_unless_asked_otherwise() -> None:
    task = build_task(TaskConfig(name="mine", kind="custom", path=f"{HERE}:Echo"))
    assert task.score(task[0], "42</think>7") == 1.0


def test_an_unknown_part_is_refused_and_tasks_of_one_name_agree() -> None:
    with pytest.raises(TaskError, match="task mine: graded_part 'answer' is unknown; choose all or after_thinking"):
        build_task(TaskConfig(name="mine", kind="custom", path=f"{HERE}:Echo", graded_part="answer"))
    with pytest.raises(TaskError, match="two tasks called chain_sum differ in graded_part"):
        tasks_by_name([TaskConfig(name="chain_sum"), CONFIGS["reasoning_gym"]])
