"""Configs become tasks, and a setting that is wrong or unused is an error that names the task."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.build import build_task, tasks_by_name
from megatron_dppo.tasks.config import CodeRewardConfig, FieldsConfig, TaskConfig
from megatron_dppo.tasks.custom_reward import CustomRewardTask
from megatron_dppo.tasks.reasoning_gym_task import ReasoningGymTask
from megatron_dppo.tasks.task import Task


def make_sums(config: TaskConfig) -> Task:
    """A custom task factory."""
    return ReasoningGymTask(config.name, dict(config.parameters), size=config.size or 7, dataset="chain_sum")


def test_a_config_from_yaml_builds_its_task() -> None:
    yaml = "{name: sums, dataset: chain_sum, parameters: {min_terms: 2, max_terms: 2}, size: 5}"
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), OmegaConf.create(yaml)))
    assert isinstance(config, TaskConfig)
    task = build_task(config)
    assert (task.name, len(task)) == ("sums", 5)
    assert pickle.loads(pickle.dumps(config)) == config  # scoring workers get configs this way
    assert pickle.loads(pickle.dumps(task[0])) == task[0]


def test_a_jsonl_task_and_a_reward_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "Say something."}))
    reward = "tests.tasks.rewards_for_tests:follow_orders"
    task = build_task(TaskConfig(name="free", kind="jsonl", path=str(path), reward=reward))
    assert isinstance(task, CustomRewardTask)
    assert task.score(task[0], "return 0.5") == 0.5


def test_a_custom_task_comes_from_the_users_factory() -> None:
    task = build_task(TaskConfig(name="mine", kind="custom", path="tests.tasks.test_build:make_sums"))
    assert (task.name, len(task)) == ("mine", 7)
    with pytest.raises(TaskError, match=r"task mine: the factory .* failed with TaskError: .*no parameter 'x'"):
        build_task(TaskConfig(name="mine", kind="custom", path="tests.tasks.test_build:make_sums", parameters={"x": 1}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "a task has no name"),
        (
            {"name": "a", "kind": "json"},
            "kind 'json' is unknown; choose reasoning_gym, jsonl, parquet, dataset or custom",
        ),
        ({"name": "a", "kind": "jsonl"}, "task a: kind jsonl needs path"),
        ({"name": "a", "kind": "custom"}, "task a: kind custom needs path"),
        ({"name": "chain_sum", "path": "x"}, "task chain_sum: kind reasoning_gym has no use for path"),
        ({"name": "a", "kind": "jsonl", "path": "x", "parameters": {"n": 1}}, "has no use for parameters"),
        ({"name": "a", "kind": "parquet", "path": "x", "paths": ["y"]}, "needs path, the file to read, or paths"),
        ({"name": "a", "code_reward": CodeRewardConfig()}, "code_reward needs tests"),
        ({"name": "a", "code_reward": CodeRewardConfig(), "reward": "a:b"}, "reward and code_reward are two rewards"),
        (
            {"name": "a", "kind": "jsonl", "code_reward": CodeRewardConfig(), "answer_extraction": "tag"},
            "it has no use for answer_extraction",
        ),
        ({"name": "a", "fields": FieldsConfig(answer="x")}, "kind reasoning_gym has no use for fields"),
        ({"name": "a", "kind": "jsonl", "path": "x", "size": 0}, "size must be at least 1"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_task(TaskConfig(**settings))


def test_training_and_evaluation_may_share_a_name_if_they_grade_alike() -> None:
    train, evaluation = TaskConfig(name="chain_sum", size=9), TaskConfig(name="chain_sum", size=3, seed=1)
    assert tasks_by_name([train, evaluation]) == {"chain_sum": train}
    with pytest.raises(TaskError, match="two tasks called chain_sum differ in answer_extraction"):
        tasks_by_name([train, TaskConfig(name="chain_sum", answer_extraction="tag")])
