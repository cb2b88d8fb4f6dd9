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
from megatron_dppo.tasks.file_problems import FileProblems
from megatron_dppo.tasks.graded_part import AfterThinkingTask, check_graded_part
from megatron_dppo.tasks.held_out import EvaluationSet
from megatron_dppo.tasks.mixture import TaskMixture
from megatron_dppo.tasks.problem_fields import AnswerKind, needed_columns
from megatron_dppo.tasks.rows.open_rows import FILE_KINDS, open_rows
from megatron_dppo.tasks.rows.row import JoinedRows
from megatron_dppo.tasks.task import Problem, Task
from megatron_dppo.tasks.valid_text import check_text

# Settings that a kind does not read: one that is set is a mistake, not a detail.
_UNUSED = {
    "reasoning_gym": ("path", "paths", "fields"),
    **dict.fromkeys(FILE_KINDS, ("dataset", "parameters")),
    "custom": ("paths", "fields"),
}
# What two tasks of one name (for training and evaluation, say) may differ in: which problems, not how they are graded.
_PROBLEM_FIELDS = ("size", "seed", "weight", "path", "paths", "fields")


def build_task(config: TaskConfig) -> Task:
    """The task that a config describes. Raises TaskError, naming the task and the remedy."""
    check_task(config)
    if config.kind in FILE_KINDS:
        return _with_reward(build_file_problems(config), config)
    task = _build_reasoning_gym(config) if config.kind == "reasoning_gym" else _build_custom(config)
    return _with_reward(task, config)


def build_grader(config: TaskConfig) -> Task:
    """The task as those need it who grade its problems and do not list them: without reading its files."""
    if config.kind not in FILE_KINDS:
        return build_task(config)
    check_task(config)
    return _with_reward(FileProblems(config.name, JoinedRows([]), config.fields), config)


def check_task(config: TaskConfig) -> None:
    """Raise TaskError for settings that make no sense, as far as they tell by themselves."""
    if config.name in (MISSING, ""):
        raise TaskError("a task has no name; set name")
    check_graded_part(config.name, config.graded_part)
    for field in dataclasses.fields(TaskConfig):
        check_text(getattr(config, field.name), f"task {config.name}: {field.name}")
    if config.kind not in _UNUSED:
        known = ", ".join(list(_UNUSED)[:-1])
        raise TaskError(f"task {config.name}: kind {config.kind!r} is unknown; choose {known} or {list(_UNUSED)[-1]}")
    rewards = [name for name in ("reward", "http_reward", "code_reward") if getattr(config, name) is not None]
    if len(rewards) > 1:
        raise TaskError(f"task {config.name}: {' and '.join(rewards)} are two rewards; keep one")
    if config.code_reward is not None and config.kind == "reasoning_gym":
        raise TaskError(f"task {config.name}: code_reward needs tests, which problems of reasoning_gym have not")
    if config.code_reward is not None and config.answer_extraction != TaskConfig().answer_extraction:
        raise TaskError(
            f"task {config.name}: code_reward takes the last code block; it has no use for answer_extraction"
        )
    for setting in _UNUSED[config.kind]:
        if getattr(config, setting) != getattr(TaskConfig(), setting):
            raise TaskError(f"task {config.name}: kind {config.kind} has no use for {setting}")


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


def build_file_problems(config: TaskConfig, checked: bool = True) -> FileProblems:
    """The problems of a task whose kind is one of ``FILE_KINDS``; ``checked``: see there. Raises TaskError."""
    if (config.path is None) == (not config.paths):
        raise TaskError(
            f"task {config.name}: kind {config.kind} needs path, the file to read, or paths, several of them"
        )
    if config.size is not None and config.size < 1:
        raise TaskError(f"task {config.name}: size must be at least 1, not {config.size}")
    paths = [config.path] if config.path is not None else config.paths
    answer_kind: AnswerKind = "value"
    if config.code_reward is not None:
        answer_kind = "tests"
    elif config.reward is not None or config.http_reward is not None:
        answer_kind = "optional"
    columns = needed_columns(config.fields, answer_kind)
    try:
        rows = open_rows(config.kind, paths, config.size, columns)
    except TaskError as error:
        raise TaskError(f"task {config.name}: {error}") from error
    files = ", ".join(paths)
    if not len(rows):
        raise TaskError(f"task {config.name}: {files} holds no problems")
    if config.size is not None and len(rows) < config.size:
        raise TaskError(f"task {config.name}: {files} holds {len(rows)} problems, fewer than size={config.size}")
    return FileProblems(config.name, rows, config.fields, answer_kind, checked)


def _with_reward(problems: Task | FileProblems, config: TaskConfig) -> Task:
    """The problems with the reward that the config names; without one, with their own, or math-verify for those of files."""
    task: Task
    if config.reward is not None:
        task = CustomRewardTask(problems, config.reward, config.answer_extraction)
    elif config.http_reward is not None:
        from megatron_dppo.tasks.http_reward import HttpRewardTask

        task = HttpRewardTask(problems, config.http_reward, config.answer_extraction)
    elif config.code_reward is not None:
        from megatron_dppo.tasks.code.code_task import CodeTask

        task = CodeTask(problems, config.code_reward)
    elif isinstance(problems, FileProblems):
        from megatron_dppo.tasks.math_task import MathTask

        task = MathTask(problems, config.answer_extraction)
    else:
        task = problems
    return AfterThinkingTask(task) if config.graded_part == "after_thinking" else task


def _build_reasoning_gym(config: TaskConfig) -> Task:
    from megatron_dppo.tasks.reasoning_gym_task import ReasoningGymTask

    return ReasoningGymTask(
        name=config.name,
        dataset=config.dataset,
        parameters=config.parameters,
        size=1000 if config.size is None else config.size,
        seed=config.seed,
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
