"""Prompts from a JSONL file: one JSON object per line, with the fields of GSM8K or of DAPO-Math."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.answer_extraction import check_answer_extraction, extract_answer
from megatron_dppo.tasks.math_scoring import score_math
from megatron_dppo.tasks.task import Problem

_QUESTION_FIELDS = "question or prompt"
_ANSWER_FIELDS = "reward_model.ground_truth, answer or solution"


class JsonlTask:
    """The problems of a JSONL file, graded by value with math-verify.

    Each line holds a question, in ``question`` or ``prompt`` (a string, or a chat of one user message with or without a
    system message before it), and a reference answer, in ``reward_model.ground_truth``, ``answer`` or ``solution``, the
    first of these that is there. Of an answer with ``####`` (GSM8K) only what follows the mark is kept. The line's
    other fields are carried in the problem's metadata. Blank lines are skipped; repeated ids and questions are fine.

    Args:
        name: the task's name in problem ids and logs.
        path: the file.
        size: the first so many problems only; None: all of them.
        require_answer: False for a custom reward that needs no reference.
        answer_extraction: see ``answer_extraction.extract_answer``; with ``none`` math-verify finds the answer itself.

    Raises:
        TaskError: the file cannot be read, is empty, is shorter than ``size``, or has a malformed line (its number is
            named).
    """

    def __init__(
        self,
        name: str,
        path: str | Path,
        size: int | None = None,
        require_answer: bool = True,
        answer_extraction: str = "none",
    ) -> None:
        check_answer_extraction(answer_extraction)
        if size is not None and size < 1:
            raise TaskError(f"task {name}: size must be at least 1, not {size}")
        self.name = name
        self._answer_extraction = answer_extraction
        self._problems = _read_problems(name, Path(path), size, require_answer)

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"task {self.name} has {len(self)} problems; there is no number {index}")
        return self._problems[index]

    def score(self, problem: Problem, response: str) -> float:
        """1.0 if the answer equals the reference, else 0.0. Raises ValueError on an unreadable reference."""
        if problem.answer is None:
            raise ValueError("the problem has no reference answer")
        answer = extract_answer(response, self._answer_extraction)
        return score_math(problem.answer, answer) if answer else 0.0


def _read_problems(name: str, path: Path, size: int | None, require_answer: bool) -> list[Problem]:
    problems: list[Problem] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if size is not None and len(problems) == size:
                    break
                if line.strip():
                    problem_id = f"{name}/{len(problems)}"
                    problems.append(_read_problem(line, problem_id, f"{path}, line {number}", require_answer))
    except OSError as error:
        raise TaskError(f"task {name}: cannot read {path}: {error.strerror or error}") from error
    if not problems:
        raise TaskError(f"task {name}: {path} holds no problems")
    if size is not None and len(problems) < size:
        raise TaskError(f"task {name}: {path} holds {len(problems)} problems, fewer than size={size}")
    return problems


def _read_problem(line: bytes, problem_id: str, place: str, require_answer: bool) -> Problem:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TaskError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise TaskError(f"{place}: expected a JSON object, found {type(row).__name__}")
    question, system_prompt = _read_question(row, place)
    answer = _read_answer(row, place)
    if answer is None and require_answer:
        raise TaskError(f"{place}: no {_ANSWER_FIELDS}; the fields are {', '.join(row)}")
    metadata = {key: value for key, value in row.items() if key not in ("question", "prompt")}
    if system_prompt is not None:
        metadata["system_prompt"] = system_prompt
    return Problem(problem_id, question, answer, metadata)


def _read_question(row: dict[str, Any], place: str) -> tuple[str, str | None]:
    """The question, and the system message of a chat if it has one."""
    prompt = row.get("question", row.get("prompt"))
    if prompt is None:
        raise TaskError(f"{place}: no {_QUESTION_FIELDS}; the fields are {', '.join(row)}")
    system_prompt = None
    if isinstance(prompt, list):
        try:
            messages = [(message["role"], message["content"]) for message in prompt]
        except (TypeError, KeyError):
            raise TaskError(f"{place}: a chat prompt is a list of objects with role and content") from None
        if [role for role, _ in messages] not in (["user"], ["system", "user"]):
            raise TaskError(
                f"{place}: a chat prompt is one user message, with or without a system message before it; "
                f"this one has the roles {', '.join(str(role) for role, _ in messages) or 'none'}"
            )
        prompt = messages[-1][1]
        system_prompt = messages[0][1] if len(messages) == 2 else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise TaskError(f"{place}: the question is empty or not a text")
    return prompt.strip(), system_prompt


def _read_answer(row: dict[str, Any], place: str) -> str | None:
    reward_model = row.get("reward_model")
    candidates = [
        reward_model.get("ground_truth") if isinstance(reward_model, dict) else None,
        row.get("answer"),
        row.get("solution"),
    ]
    answer = next((candidate for candidate in candidates if candidate is not None), None)
    if answer is None:
        return None
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise TaskError(f"{place}: the answer is a {type(answer).__name__}; expected a text or a number")
    text = str(answer).rpartition("####")[2].strip()
    if not text:
        raise TaskError(f"{place}: the answer is empty")
    return text
