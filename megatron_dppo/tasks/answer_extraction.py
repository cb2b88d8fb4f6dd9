"""Find the answer inside a response, before it is compared with the reference.

Every search takes one pass: a response may be a megabyte of openings that nothing closes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.number_spelling import last_number

ANSWER_EXTRACTIONS = ("none", "last_line", "last_number", "boxed", "tag")

_BRACES = re.compile(r"\\boxed\s{0,8}\{|\\.|[{}]", re.DOTALL)  # an escaped brace is a character, not a group
_TAGS = re.compile(r"<(/?)answer>")
_MARKUP_LINE = re.compile(r"[`~]{3,}\w*|[-*_=]{3,}|\$\$|\\\]")  # closes a block or rules it off, and says nothing
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)
_PYTHON = ("python", "py", "python3", "")
_EMPHASIS = re.compile(r"(\*\*\*|\*\*|[*`])(?=\S)((?:(?!\1).)+)(?<=\S)\1")


class Box(NamedTuple):
    """A complete ``\\boxed{...}``: where in the response it starts and ends, and where its content begins."""

    start: int
    begin: int
    end: int

    def content(self, response: str) -> str:
        """What is in the box, stripped. Cut out when asked for: boxes within boxes hold each other's text."""
        return response[self.begin : self.end - 1].strip()


def check_answer_extraction(extraction: str) -> None:
    """Raise TaskError unless ``extraction`` is one of ``ANSWER_EXTRACTIONS``."""
    if extraction not in ANSWER_EXTRACTIONS:
        raise TaskError(f"answer_extraction {extraction!r} is unknown; choose one of {', '.join(ANSWER_EXTRACTIONS)}")


def extract_answer(response: str, extraction: str) -> str | None:
    r"""The answer that a response gives, stripped, or None if it has no such part (a wrong answer, not a failure).

    Args:
        response: the decoded response.
        extraction: ``none``: the whole response; ``last_line``: its last line that says something (not the end of a code
            block), without emphasis around it; ``last_number``: the last number in plain ASCII, see
            ``number_spelling.last_number``; ``boxed``: the content of the last ``\boxed{...}``; ``tag``: the content of
            the last ``<answer>...</answer>``. The last one counts, because models correct themselves.
    """
    if extraction == "none":
        return response.strip()
    if extraction == "last_line":
        return _last_line(response)
    if extraction == "last_number":
        return last_number(response)
    if extraction == "tag":
        return _last_tagged(response)
    check_answer_extraction(extraction)
    boxes = complete_boxes(response)
    return boxes[-1].content(response) if boxes else None


def last_code_block(response: str) -> str | None:
    """The content of the last fenced block that is closed and that says it is Python, or says nothing; None without one."""
    block, opening = None, None
    for fence in _FENCE.finditer(response):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]) and not fence[2]:
            if opening[2].lower() in _PYTHON:
                block = (opening.end() + 1, fence.start())
            opening = None
    return None if block is None else response[slice(*block)]


def complete_boxes(response: str) -> list[Box]:
    """Every ``\\boxed{...}`` whose brace is closed, by where it begins. A nested one counts as well as that around it."""
    boxes = []
    open_groups: list[re.Match[str]] = []
    for brace in _BRACES.finditer(response):
        if brace[0].endswith("{") and brace[0] != "\\{":
            open_groups.append(brace)
        elif brace[0] == "}" and open_groups:
            opening = open_groups.pop()
            if opening[0] != "{":
                boxes.append(Box(opening.start(), opening.end(), brace.end()))
    return sorted(boxes)


def without_emphasis(text: str) -> str:
    """``34`` for ``**34**``, ``*34*`` and ```34```; the text must be emphasised as a whole."""
    text = text.strip()
    emphasised = _EMPHASIS.fullmatch(text)
    return emphasised[2] if emphasised else text


def _last_line(response: str) -> str | None:
    for line in reversed(response.splitlines()):
        if line.strip() and not _MARKUP_LINE.fullmatch(line.strip()):
            return without_emphasis(line)
    return None


def _last_tagged(response: str) -> str | None:
    content, begin = None, None
    for tag in _TAGS.finditer(response):
        if not tag[1]:
            begin = tag.end()
        elif begin is not None:
            content, begin = (begin, tag.start()), None
    return None if content is None else response[slice(*content)].strip()
