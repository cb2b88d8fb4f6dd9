"""Grading without the seconds of a core that every replica's scoring worker takes to start."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dppo.tasks.build import build_task, tasks_by_name
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.scoring import Scorer, ScoreResult
from megatron_dppo.tasks.task import Problem


class ScorerInThisProcess(Scorer):
    """Gives the real one's rewards; a task that raises or hangs is the caller's trouble."""

    def __init__(self, configs: Sequence[TaskConfig], timeout_s: float = 10.0, workers: int = 1) -> None:
        super().__init__(configs, timeout_s, workers)
        self._tasks = {name: build_task(config) for name, config in tasks_by_name(configs).items()}

    def score(self, pairs: Sequence[tuple[Problem, str]]) -> list[ScoreResult]:
        return [ScoreResult(self._tasks[problem.task_name].score(problem, text)) for problem, text in pairs]
