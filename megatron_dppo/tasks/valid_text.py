"""Text that a tokenizer and a log file can take: what cannot be encoded is refused where it comes from."""

from __future__ import annotations

from typing import Any

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.task import Problem


def check_text(value: Any, what: str) -> None:
    """Raise TaskError, naming ``what``, if a text in ``value`` (nested lists and dicts, keys too) cannot be encoded.

    That is a lone surrogate, half of a character, which no encoding has; or NUL, which ends a text for half of the world.
    """
    if isinstance(value, str):
        if "\0" in value:
            raise TaskError(f"{what} holds a NUL character at position {value.index(chr(0))}; remove it")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TaskError(
                f"{what} holds half a character (the lone surrogate {value[error.start]!a}) at position {error.start}, "
                "which cannot be encoded; write the whole character"
            ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, f"a key of {what}")
            check_text(item, f"{what}.{key}" if isinstance(key, str) else what)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_text(item, what)


def check_problem_text(problem: Problem) -> Problem:
    """The problem itself. Raises TaskError, naming it, if a text that is encoded or logged is no text or cannot be."""
    for what, text in (
        ("question", problem.question),
        ("answer", problem.answer),
        ("system_prompt", problem.metadata.get("system_prompt")),
    ):
        if not isinstance(text, str) and (text is not None or what == "question"):
            raise TaskError(f"{problem.problem_id}: the {what} must be a text, not {type(text).__name__}")
        check_text(text, f"{problem.problem_id}: the {what}")
    return problem
