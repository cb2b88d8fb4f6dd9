"""Prompts from a JSONL file: one JSON object per line, with the fields of GSM8K or of DAPO-Math."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.answer_extraction import check_answer_extraction, extract_answer
from megatron_dppo.tasks.math_scoring import score_math
from megatron_dppo.tasks.number_spelling import plain_decimal
from megatron_dppo.tasks.strict_json import read_object
from megatron_dppo.tasks.task import Problem

_QUESTION_FIELDS = "question or prompt"
_ANSWER_FIELDS = "reward_model.ground_truth, answer or solution"


class JsonlTask:
    """The problems of a JSONL file, graded by value with math-verify.

    Each line holds a question, in ``question`` or ``prompt`` (a string, or a chat of one user message with or without a
    system message before it), and a reference answer, in ``reward_model.ground_truth``, ``answer`` or ``solution``, the
    first of these that is there. Of an answer with ``####`` (GSM8K) only what follows the mark is kept; a number is kept
    digit by digit, without an exponent. The line's other fields are carried in the problem's metadata; a
    ``system_prompt`` among them, or the chat's system message, replaces the task's. Null is the same as absent. Blank
    lines are skipped; repeated ids and questions are fine.

    Args:
        name: the task's name in problem ids and logs.
        path: the file.
        size: the first so many problems only; None: all of them.
        require_answer: False for a custom reward that needs no reference.
        answer_extraction: see ``answer_extraction.extract_answer``; with ``none`` math-verify finds the answer itself.

    Raises:
        TaskError: the file cannot be read, is empty, is shorter than ``size``, or has a malformed line (its number is
            named): see ``strict_json.read_object`` for what JSON has to be.
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
        if not answer:
            return 0.0
        # A box says that its content is the answer as a whole; without it that would be guessed.
        return score_math(problem.answer, f"\\boxed{{{answer}}}" if self._answer_extraction == "boxed" else answer)


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
    row = read_object(line, place)
    question, system_prompt = _read_question(row, place)
    answer = _read_answer(row, line, place)
    if answer is None and require_answer:
        raise TaskError(f"{place}: no {_ANSWER_FIELDS}; the fields are {', '.join(row)}")
    metadata = {key: value for key, value in row.items() if key not in ("question", "prompt", "system_prompt")}
    if system_prompt is not None:
        metadata["system_prompt"] = system_prompt
    return Problem(problem_id, question, answer, metadata)


def _read_question(row: dict[str, Any], place: str) -> tuple[str, str | None]:
    """The question, and the system prompt if there is one: a chat's system message, else the field."""
    prompt = row["question"] if row.get("question") is not None else row.get("prompt")
    if prompt is None:
        raise TaskError(f"{place}: no {_QUESTION_FIELDS}; the fields are {', '.join(row)}")
    system_prompts = [row.get("system_prompt")]
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
        system_prompts += [content for role, content in messages if role == "system"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise TaskError(f"{place}: the question is empty or not a text")
    given = [system_prompt for system_prompt in system_prompts if system_prompt is not None]
    for system_prompt in given:
        if not isinstance(system_prompt, str):
            raise TaskError(f"{place}: the system prompt is a {type(system_prompt).__name__}; expected a text")
    return prompt.strip(), given[-1] if given else None


def _read_answer(row: dict[str, Any], line: bytes, place: str) -> str | None:
    answer = _find_answer(row)
    if answer is None:
        return None
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise TaskError(f"{place}: the answer is a {type(answer).__name__}; expected a text or a number")
    if isinstance(answer, float):
        return plain_decimal(_find_answer(read_object(line, place, exact=True)))
    text = str(answer).rpartition("####")[2].strip()
    if not text:
        raise TaskError(f"{place}: the answer is empty")
    return text


def _find_answer(row: dict[str, Any]) -> Any:
    reward_model = row.get("reward_model")
    candidates = (
        reward_model.get("ground_truth") if isinstance(reward_model, dict) else None,
        row.get("answer"),
        row.get("solution"),
    )
    return next((candidate for candidate in candidates if candidate is not None), None)
