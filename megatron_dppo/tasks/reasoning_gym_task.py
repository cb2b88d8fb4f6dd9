"""Procedural tasks of the reasoning-gym library: any number of problems, made on the spot, each with a verifier."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from megatron_dppo.compat.extras import from_extra
from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.answer_extraction import check_answer_extraction, extract_answer
from megatron_dppo.tasks.number_spelling import plain_decimal
from megatron_dppo.tasks.task import Problem

with from_extra("tasks"):
    from reasoning_gym.factory import DATASETS, create_dataset


class ReasoningGymTask:
    """A reasoning-gym dataset.

    Problem ``index`` depends on ``seed + index`` alone, in nearly all of the library's generators: two tasks whose
    ranges of ``seed + index`` overlap share problems. ``held_out.py`` keeps evaluation clear of that.

    The score is the library's: 1 for the right answer; for other answers many verifiers return 0, some a little credit
    (0.01 or 0.05 for a well-formed wrong answer), spell_backward the share of right characters, and the library's
    default ``len(reference) / len(answer)`` if the answer contains the reference. That shaping is kept, so a mean
    reward is no share of correct answers; those have a score of 1.

    Args:
        name: the task's name in problem ids and logs.
        dataset: the library's name of the dataset; None: the same as ``name``.
        parameters: the dataset's own settings, e.g. ``{"min_terms": 2, "max_terms": 2}`` for chain_sum.
        size: number of problems.
        seed: of the generator.
        answer_extraction: see ``answer_extraction.extract_answer``.

    Raises:
        TaskError: unknown dataset or parameter (with the nearest names that exist), or a value the dataset refuses.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, Any] | None = None,
        size: int = 1000,
        seed: int = 0,
        dataset: str | None = None,
        answer_extraction: str = "none",
    ) -> None:
        if size < 1:
            raise TaskError(f"task {name}: size must be at least 1, not {size}")
        check_answer_extraction(answer_extraction)
        self.name = name
        self._answer_extraction = answer_extraction
        self._dataset = _create_dataset(dataset or name, dict(parameters or {}), size, seed)

    def __len__(self) -> int:
        return self._dataset.size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):  # the library itself would happily make problem number `size`
            raise IndexError(f"task {self.name} has {len(self)} problems; there is no number {index}")
        entry = self._dataset[index]
        answer = entry["answer"]
        return Problem(
            problem_id=f"{self.name}/{index}",
            question=entry["question"].strip(),
            answer=None if answer is None else plain_decimal(answer) if isinstance(answer, float) else str(answer),
            metadata={"entry": entry},
        )

    def score(self, problem: Problem, response: str) -> float:
        """The library's score of the extracted answer; raises whatever its verifier raises on odd answers."""
        answer = extract_answer(response, self._answer_extraction)
        return float(self._dataset.score_answer(answer, problem.metadata["entry"])) if answer else 0.0


def _create_dataset(dataset: str, parameters: dict[str, Any], size: int, seed: int) -> Any:
    if dataset not in DATASETS:
        raise TaskError(f"reasoning-gym has no task {dataset!r}{_nearest(dataset, DATASETS)}")
    reserved = {"size", "seed"} & parameters.keys()
    if reserved:
        raise TaskError(
            f"reasoning-gym task {dataset}: set {' and '.join(sorted(reserved))} on the task, not in parameters"
        )
    config_class = DATASETS[dataset][1]
    known = {field.name for field in dataclasses.fields(config_class)}
    for parameter in parameters:
        if parameter not in known:
            choices = ", ".join(sorted(known - {"size", "seed"}))
            raise TaskError(
                f"reasoning-gym task {dataset} has no parameter {parameter!r}{_nearest(parameter, known)}; "
                f"it has: {choices}"
            )
    try:
        return create_dataset(dataset, size=size, seed=seed, **parameters)
    except (AssertionError, TypeError, ValueError) as error:  # the library's own checks; assert for most of them
        raise TaskError(f"reasoning-gym task {dataset} refuses the parameters {parameters}: {error}") from error


def _nearest(name: str, known: Any) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.4)
    return f"; did you mean {', '.join(nearest)}?" if nearest else ""
