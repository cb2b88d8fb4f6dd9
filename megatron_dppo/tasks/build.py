"""From task configs to tasks: the only place that knows which kinds there are.

The module of a kind is imported when a task of that kind is built: reasoning-gym and math-verify take a second or
more to import, each, and every scoring worker would pay for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from omegaconf import MISSING

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.custom_reward import CustomRewardTask
from megatron_dppo.tasks.dotted_path import load_object
from megatron_dppo.tasks.graded_part import AfterThinkingTask, check_graded_part
from megatron_dppo.tasks.held_out import EvaluationSet
from megatron_dppo.tasks.mixture import TaskMixture
from megatron_dppo.tasks.task import Problem, Task
from megatron_dppo.tasks.valid_text import check_text

# What two tasks of one name (for training and evaluation, say) may differ in: which problems, not how they are graded.
_PROBLEM_FIELDS = ("size", "seed", "weight", "path")


def build_task(config: TaskConfig) -> Task:
    """The task that a config describes. Raises TaskError, naming the task and the remedy."""
    if config.name in (MISSING, ""):
        raise TaskError("a task has no name; set name")
    check_graded_part(config.name, config.graded_part)
    for field in dataclasses.fields(TaskConfig):
        check_text(getattr(config, field.name), f"task {config.name}: {field.name}")
    if config.kind == "reasoning_gym":
        task = _build_reasoning_gym(config)
    elif config.kind == "jsonl":
        task = _build_jsonl(config)
    elif config.kind == "custom":
        task = _build_custom(config)
    else:
        raise TaskError(f"task {config.name}: kind {config.kind!r} is unknown; choose reasoning_gym, jsonl or custom")
    if config.reward is not None:
        task = CustomRewardTask(task, config.reward, config.answer_extraction)
    return AfterThinkingTask(task) if config.graded_part == "after_thinking" else task


def build_mixture(
    configs: Sequence[TaskConfig],
    seed: int,
    held_out: EvaluationSet | None = None,
    fits: Callable[[Problem], bool] | None = None,
) -> TaskMixture:
    """The stream of training problems.

    Args:
        configs: the training tasks; their ``weight`` sets the shares.
        seed: of the order.
        held_out: problems never to be trained on.
        fits: problems for which it is False are skipped, e.g. ``PromptEncoder.fits``: prompts that are not too long.
    """

    def admissible(problem: Problem) -> bool:
        return (held_out is None or problem not in held_out) and (fits is None or fits(problem))

    tasks = [build_task(config) for config in configs]
    return TaskMixture(tasks, [config.weight for config in configs], seed, admissible)


def build_evaluation_set(configs: Sequence[TaskConfig]) -> EvaluationSet:
    """The held-out problems; pass it to ``build_mixture`` as ``held_out``."""
    return EvaluationSet([build_task(config) for config in configs])


def tasks_by_name(configs: Sequence[TaskConfig]) -> dict[str, TaskConfig]:
    """One config per task name, for those who grade and prompt by ``Problem.task_name``.

    A training and an evaluation task may share a name if they differ in their problems only (size, seed, weight, path
    of the file). Raises TaskError if they differ in anything else: which of the two a problem belongs to could not be
    told.
    """
    by_name: dict[str, TaskConfig] = {}
    for config in configs:
        first = by_name.setdefault(config.name, config)
        for field in dataclasses.fields(TaskConfig):
            may_differ = field.name in _PROBLEM_FIELDS and not (field.name == "path" and config.kind == "custom")
            if not may_differ and getattr(first, field.name) != getattr(config, field.name):
                raise TaskError(
                    f"two tasks called {config.name} differ in {field.name} ({getattr(first, field.name)!r} and "
                    f"{getattr(config, field.name)!r}); give one of them another name"
                )
    return by_name


def _build_reasoning_gym(config: TaskConfig) -> Task:
    from megatron_dppo.tasks.reasoning_gym_task import ReasoningGymTask

    _refuse(config, "path")
    return ReasoningGymTask(
        name=config.name,
        dataset=config.dataset,
        parameters=config.parameters,
        size=1000 if config.size is None else config.size,
        seed=config.seed,
        answer_extraction=config.answer_extraction,
    )


def _build_jsonl(config: TaskConfig) -> Task:
    from megatron_dppo.tasks.jsonl_task import JsonlTask

    _refuse(config, "dataset", "parameters")
    if config.path is None:
        raise TaskError(f"task {config.name}: kind jsonl needs path, the file to read")
    return JsonlTask(
        name=config.name,
        path=config.path,
        size=config.size,
        require_answer=config.reward is None,
        answer_extraction=config.answer_extraction,
    )


def _build_custom(config: TaskConfig) -> Task:
    """Call the user's factory: ``factory(config: TaskConfig) -> Task``."""
    if config.path is None:
        raise TaskError(f"task {config.name}: kind custom needs path, the factory as package.module:function")
    factory = load_object(config.path, "task factory")
    try:
        return factory(config)
    except Exception as error:
        raise TaskError(
            f"task {config.name}: the factory {config.path} failed with {type(error).__name__}: {error}"
        ) from error


def _refuse(config: TaskConfig, *fields: str) -> None:
    """A setting that a kind does not read is a mistake, not a detail."""
    for field in fields:
        if getattr(config, field):
            raise TaskError(f"task {config.name}: kind {config.kind} has no use for {field}")
