"""The study's reward: all or nothing.

The library's own grading of ``spell_backward`` gives a share for every right letter, so that a wrong letter in a mostly right
answer is rewarded too; in the pilot that hid most of what tells methods apart (docs/stability_study.md).
"""

from __future__ import annotations

from typing import Any


def whole_answer(question: str, response: str, answer: str | None, metadata: dict[str, Any]) -> float:
    """1 if the response is the answer, but for white space around it and the case of letters, else 0."""
    return float(answer is not None and response.strip().lower() == answer.lower())
