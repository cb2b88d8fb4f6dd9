"""From a row of a file to a problem: which fields are the question, the answer and the system prompt.

A field is named by a dotted path: ``reward_model.ground_truth`` is a member, ``ground_truth.0`` the first of a list.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.code.test_cases import read_tests
from megatron_dppo.tasks.config import FieldsConfig
from megatron_dppo.tasks.number_spelling import plain_decimal
from megatron_dppo.tasks.rows.row import Row
from megatron_dppo.tasks.task import Problem

# value: a text or a number | optional: the same, if it is there | tests: of a program, any JSON.
AnswerKind = Literal["value", "optional", "tests"]

# Where common data sets have them; the first that is there and not null counts.
_QUESTION_FIELDS = ("question", "prompt", "problem", "messages", "input")
_ANSWER_FIELDS = (
    "reward_model.ground_truth",
    "ground_truth",
    "final_answer",
    "expected_answer",
    "answer",
    "label",
    "solution",
)
_TEST_FIELDS = (
    "reward_model.ground_truth",
    "ground_truth",
    "input_output",
    "test_cases",
    "test_list",
    "tests",
    "test",
    "label",
)


def needed_columns(fields: FieldsConfig, answer_kind: AnswerKind) -> set[str] | None:
    """The top-level fields that ``read_problem`` looks at; None: all of them, as metadata."""
    if fields.metadata is None:
        return None
    questions, answers = _candidates(fields, answer_kind)
    paths = (*questions, *answers, fields.system_prompt, *fields.metadata)
    return {name for path in paths for name in (path, path.partition(".")[0])}


def read_problem(row: Row, problem_id: str, fields: FieldsConfig, answer_kind: AnswerKind) -> Problem:
    """The problem of a row. Raises TaskError, naming file and row, for whatever is missing, empty or of a wrong type."""
    values = row.read()
    questions, answers = _candidates(fields, answer_kind)
    question_field = _first(values, questions)
    if question_field is None:
        raise TaskError(f"{row.place}: no {_one_of(questions)}; the fields are {', '.join(values)}")
    question, system_prompt = _read_question(values, question_field, fields.system_prompt, row.place)
    answer_field = _first(values, answers)
    if answer_field is None and answer_kind != "optional":
        raise TaskError(f"{row.place}: no {_one_of(answers)}; the fields are {', '.join(values)}")
    read_answer = _read_tests if answer_kind == "tests" else _read_value
    answer = None if answer_field is None else read_answer(row, values, answer_field)
    metadata = _metadata(values, fields, question_field, row.place)
    if system_prompt is not None:
        metadata["system_prompt"] = system_prompt
    if answer_kind == "tests" and answer is not None:
        try:
            read_tests(answer, metadata)
        except ValueError as error:
            raise TaskError(f"{row.place}: {answer_field}: {error}") from None
    return Problem(problem_id, question, answer, metadata)


def _candidates(fields: FieldsConfig, answer_kind: AnswerKind) -> tuple[Sequence[str], Sequence[str]]:
    usual = _TEST_FIELDS if answer_kind == "tests" else _ANSWER_FIELDS
    return (
        _QUESTION_FIELDS if fields.question is None else (fields.question,),
        usual if fields.answer is None else (fields.answer,),
    )


def find_field(values: Any, path: str) -> Any:
    """What stands at a dotted path; None if nothing does."""
    if isinstance(values, dict) and path in values:
        return values[path]
    name, _, rest = path.partition(".")
    if isinstance(values, dict):
        inner = values.get(name)
    elif isinstance(values, list) and name.isascii() and name.isdecimal() and int(name) < len(values):
        inner = values[int(name)]
    else:
        return None
    return find_field(inner, rest) if rest else inner


def _first(values: dict[str, Any], paths: Sequence[str]) -> str | None:
    return next((path for path in paths if find_field(values, path) is not None), None)


def _one_of(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{', '.join(paths[:-1])} or {paths[-1]}"


def _read_question(values: dict[str, Any], field: str, system_field: str, place: str) -> tuple[str, str | None]:
    """The question, and the system prompt if there is one: a chat's system message, else the field."""
    prompt = find_field(values, field)
    system_prompts = [find_field(values, system_field)]
    if isinstance(prompt, list):
        try:
            messages = [(message["role"], _text_of(message["content"])) for message in prompt]
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


def _text_of(content: Any) -> Any:
    """The text of a message that is a list of parts, if all of them are texts; else the content as it is."""
    parts = content if isinstance(content, list) and content else []
    if parts and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return "".join(part["text"] for part in parts)
    return content


def _read_value(row: Row, values: dict[str, Any], field: str) -> str:
    answer = find_field(values, field)
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], str):
        (answer,) = answer
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise TaskError(f"{row.place}: the answer is a {type(answer).__name__}; expected a text or a number")
    if isinstance(answer, float):
        return plain_decimal(find_field(row.read(exact=True), field))
    text = str(answer).rpartition("####")[2].strip()
    if not text:
        raise TaskError(f"{row.place}: the answer is empty")
    return text


def _read_tests(row: Row, values: dict[str, Any], field: str) -> str:
    """Tests as text: JSON or Python in a text as they are, anything else as JSON."""
    tests = find_field(values, field)
    return tests if isinstance(tests, str) else json.dumps(tests, ensure_ascii=False)


def _metadata(values: dict[str, Any], fields: FieldsConfig, question_field: str, place: str) -> dict[str, Any]:
    if fields.metadata is None:
        known = {"question", "prompt", question_field.partition(".")[0], fields.system_prompt.partition(".")[0]}
        return {name: value for name, value in values.items() if name not in known}
    metadata: dict[str, Any] = {}
    for path in fields.metadata:
        name = path.rpartition(".")[2]
        if name in metadata:
            raise TaskError(f"{place}: fields.metadata has two fields that end in {name}")
        value = find_field(values, path)
        if value is not None:
            metadata[name] = value
    return metadata
