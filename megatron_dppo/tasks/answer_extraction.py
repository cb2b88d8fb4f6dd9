"""Find the answer inside a response, before it is compared with the reference."""

from __future__ import annotations

import re

from megatron_dppo.errors import TaskError

ANSWER_EXTRACTIONS = ("none", "last_line", "last_number", "boxed", "tag")

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def check_answer_extraction(extraction: str) -> None:
    """Raise TaskError unless ``extraction`` is one of ``ANSWER_EXTRACTIONS``."""
    if extraction not in ANSWER_EXTRACTIONS:
        raise TaskError(f"answer_extraction {extraction!r} is unknown; choose one of {', '.join(ANSWER_EXTRACTIONS)}")


def extract_answer(response: str, extraction: str) -> str | None:
    r"""The answer that a response gives, stripped, or None if it has no such part (a wrong answer, not a failure).

    Args:
        response: the decoded response.
        extraction: ``none``: the whole response; ``last_line``: its last non-empty line; ``last_number``: the last
            number, thousands separators removed; ``boxed``: the content of the last ``\boxed{...}``; ``tag``: the
            content of the last ``<answer>...</answer>``. The last one counts, because models correct themselves.
    """
    if extraction == "none":
        return response.strip()
    if extraction == "last_line":
        lines = response.strip().splitlines()
        return lines[-1].strip() if lines else None
    if extraction == "last_number":
        numbers = _NUMBER.findall(response)
        return numbers[-1].replace(",", "") if numbers else None
    if extraction == "tag":
        tagged = _TAG.findall(response)
        return tagged[-1].strip() if tagged else None
    check_answer_extraction(extraction)
    return _last_boxed(response)


def _last_boxed(response: str) -> str | None:
    """Content of the last complete ``\\boxed{...}``; its braces may nest, which a regular expression cannot follow."""
    start = len(response)
    while (start := response.rfind("\\boxed{", 0, start)) >= 0:
        begin = start + len("\\boxed{")
        depth = 1
        for position in range(begin, len(response)):
            depth += {"{": 1, "}": -1}.get(response[position], 0)
            if depth == 0:
                return response[begin:position].strip()
    return None
