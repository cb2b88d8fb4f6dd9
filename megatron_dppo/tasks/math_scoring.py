r"""Grade mathematical answers by value, not by spelling: 1/2, 0.5 and \frac{1}{2} are the same answer (math-verify).

What is decided here is which part of a response is its answer, and how it is spelt for the library; the library reads and
compares formulas. Answers in words are compared as text (``word_answers.py``).
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_dppo.compat.extras import from_extra
from megatron_dppo.tasks.answer_extraction import complete_boxes, without_emphasis
from megatron_dppo.tasks.number_spelling import expand_scientific, respell_numbers
from megatron_dppo.tasks.word_answers import reference_in_words, says, spell_commands

with from_extra("tasks"):
    from math_verify import LatexExtractionConfig, parse, verify

# With its time limits off (see below) the library warns once per call that limits are now our duty. They are: Scorer's.
for _module in ("parser", "grader"):
    logging.getLogger(f"math_verify.{_module}").setLevel(logging.ERROR)

# The library's patterns take quadratic time in the length, its grammar exponential time in the depth of brackets (1.6 s at
# 13, minutes at 20): a longer or deeper answer is not read, nor a response without a marked answer further back from its
# end. The longest answers (matrices) have some hundreds of characters, the deepest half a dozen brackets.
_LONGEST_ANSWER = 1000
_DEEPEST_BRACKETS = 12
_ANNOUNCEMENTS_TRIED = 3

_ANNOUNCEMENT = re.compile(
    r"(?:\banswers?\b|答案)[^\n:=.]{0,60}?(?:\b(?:is|are|be)(?![a-z])|[:=\uff1a\uff1d是为為])"
    r"|####(?=[ \t]*[-+(\\$]*[\d.]\S*[ \t]*(?:\n|\Z))",  # and not the heading "#### 2. Cases"
    re.IGNORECASE,
)
_PARAGRAPH = re.compile(r"[\s*_]*(.*?)(?:\n\s*\n|\Z)", re.DOTALL)
_SENTENCE = re.compile(r"[^\n]*?(?=[.!?](?:\s|\Z)|\n|\Z)")
_OPEN_BOX = re.compile(r"\\boxed\s{0,8}\{(?!\})")
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|;|,?\s*(?:and|or))[\s$]*")
# Dollars are delimiters in pairs around something without a gap inside, as in Pandoc's Markdown; others are money.
_MONEY = re.compile(
    r"(?P<formula>\$\$[^$]+\$\$|(?<!\\)\$(?=[^\s$])(?:\\.|[^$\n\\])*?(?<=\S)\$(?!\d))"
    r"|(?:\b[A-Z]{1,3})?(?:\\?\$|[€£¥₹])[ ~]?(?=-?\.?\d)|(?<=\d)[ ~]?(?:\\?\$|[€£¥₹])|\\\$"
)
_DELIMITED = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_SPACED_THOUSANDS = re.compile(r"(?<![\w.,])(?<!\d )[1-9]\d{0,2}(?: \d{3})+(?![\d,]| \d)")
_PROSE = re.compile(r"(?:^|[\s(])[^\W\d_]{2,}(?=[\s.,:;!?)]|\Z)|!\Z|\n")
_EULERS_READING = re.compile(r"(?<![\w.])(?:[2-9]|\d{2,})e-[1-9]\d?(?!\w|\.\d)")


class _Formula(NamedTuple):
    """A reference as math-verify holds it, and the decimals to which numbers are compared with it."""

    readings: list[Any]
    decimals: int


def score_math(answer: str, response: str) -> float:
    """1.0 if the response's final answer equals the reference, else 0.0.

    The response may be a whole chain of thought. Its answer is the content of its last complete ``\\boxed{}`` (of several,
    if only commas, ``and`` or ``or`` stand between them; a box that is cut off is no answer); without a box, what the
    last ``answer is``, ``answer:`` or ``####`` announces; without that, its last expression. A part that is the answer is
    read as one formula; in prose math-verify finds formulas between dollars, and numbers. An answer in words is graded as
    ``word_answers.py`` says. Nothing longer than 1000 characters, or with brackets more than twelve deep, is read as an
    answer.

    Numbers may be written as people do (``number_spelling.py``); ``1e-5`` is 0.00001 (where ``2e-5`` may also mean
    Euler's number, either reading counts), amounts of money are numbers. Floats are compared to six decimals, and to
    four digits if they are small; 0 to twelve decimals.

    The library's time limits are switched off because they are signals, which only the main thread may set and which do
    not interrupt C code; a hanging comparison is ended by ``scoring.Scorer``, from outside.

    Raises ValueError if the reference itself is not a mathematical expression: no response could ever be right.
    """
    reference = _read_reference(answer)
    if isinstance(reference, str):
        return float(says(_answer_in_words(response), reference))
    return float(
        verify(reference.readings, _read_response(response), float_rounding=reference.decimals, timeout_seconds=None)
    )


@functools.lru_cache(maxsize=4096)
def _read_reference(answer: str) -> _Formula | str:
    """The reference as a formula, or as the text to compare with if it is in words."""
    boxes = complete_boxes(answer)
    text = boxes[-1].content(answer) if boxes else answer.strip()
    words = reference_in_words(text)
    if words is not None:
        return words
    readings = _read_text(text) if "$" in _without_delimiters(_without_money(text)) else _read_formula(text)
    if not readings:
        raise ValueError(f"the reference answer {answer!r} is no mathematical expression that math-verify can read")
    return _Formula(readings, _decimals(readings[0]))


def _decimals(reference: Any) -> int:
    """Six; more for a small number, which would otherwise equal 0."""
    if not getattr(reference, "is_number", False):
        return 6
    try:
        size = abs(complex(reference.doit()))  # undone, a percentage stays a product
    except (TypeError, OverflowError):  # 1/0; more than 308 digits
        return 6
    if size == 0.0:
        return 12
    return max(6, 3 - math.floor(math.log10(size))) if math.isfinite(size) else 6


def _read_response(response: str) -> list[Any]:
    boxed = _boxed(response)
    if boxed is not None:
        return _read_formula(boxed)
    if _OPEN_BOX.search(response):
        return []  # the end of the response cuts its answer off
    for announced in _announced(response):
        if readings := _read_text(announced, after="answer: "):
            return readings
    return _read_text(_end_of(response))


def _boxed(response: str) -> str | None:
    """Content of the last box that is not empty, and before it of those that are listed with it."""
    boxes = [box for box in complete_boxes(response) if box.begin < box.end - 1]
    if not boxes:
        return None
    listed = [boxes.pop()]
    while boxes and _BETWEEN_BOXES.fullmatch(response, boxes[-1].end, listed[-1].start):
        listed.append(boxes.pop())
    return ", ".join(box.content(response) for box in reversed(listed))


def _announced(response: str) -> Iterator[str]:
    """What is announced as the answer, the last first: the paragraph, then what follows it up to the next announcement."""
    until = len(response)
    for announcement in reversed([*_ANNOUNCEMENT.finditer(response)][-_ANNOUNCEMENTS_TRIED:]):
        begin = announcement.end()
        paragraph = _PARAGRAPH.match(response, begin, begin + _LONGEST_ANSWER)
        if paragraph and paragraph[1]:
            yield paragraph[1]
            yield _end_of(response[paragraph.end() : until])
        until = announcement.start()


def _answer_in_words(response: str) -> str:
    boxed = _boxed(response)
    if boxed is not None:
        return boxed[:_LONGEST_ANSWER]
    if _OPEN_BOX.search(response):
        return ""
    announced = next(_announced(response), None)
    if announced is not None:
        sentence = _SENTENCE.match(announced)
        return sentence[0] if sentence else announced
    return _end_of(response).strip().rpartition("\n")[2]


def _end_of(response: str) -> str:
    """As much of the end as is read, from the first white space on: a number must not lose its first digits."""
    if len(response) <= _LONGEST_ANSWER:
        return response
    return "".join(re.split(r"\s", response[-_LONGEST_ANSWER:], maxsplit=1)[1:])


def _read_text(text: str, after: str = "") -> list[Any]:
    """Readings of a text that is a formula or has one in it; ``after`` tells math-verify that an answer follows."""
    text = without_emphasis(text)
    if not _is_readable(text):
        return []
    if not _PROSE.search(text) and "$" not in _without_delimiters(_without_money(text)):
        return _read_formula(text.lstrip("= ").rstrip(".。 "))
    return parse(after + expand_scientific(_without_money(respell_numbers(text))), parsing_timeout=None)


def _read_formula(text: str) -> list[Any]:
    """Readings of a text that is one formula and nothing else."""
    if not _is_readable(text):
        return []
    text = _without_delimiters(_without_money(respell_numbers(text)))
    text = spell_commands(_SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text))
    readings = [expand_scientific(text), *([text] if _EULERS_READING.search(text) else [])]
    found = [
        reading
        for spelt in readings
        for reading in parse(f"\\boxed{{{spelt}}}", [LatexExtractionConfig()], parsing_timeout=None)
    ]
    return (
        found if any(not isinstance(reading, str) for reading in found) else found + parse(text, parsing_timeout=None)
    )


def _is_readable(text: str) -> bool:
    steps = ((char in "([{") - (char in ")]}") for char in text)
    return len(text) <= _LONGEST_ANSWER and max(itertools.accumulate(steps), default=0) <= _DEEPEST_BRACKETS


def _without_money(text: str) -> str:
    """The text without currency signs at its numbers; formulas between dollars keep theirs."""
    return _MONEY.sub(lambda match: match["formula"] or "", text)


def _without_delimiters(text: str) -> str:
    """What stands between delimiters that enclose the whole text."""
    delimited = _DELIMITED.fullmatch(text.strip())
    return next(filter(None, delimited.groups())).strip() if delimited else text.strip()
