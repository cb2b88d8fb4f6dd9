r"""Answers in words (``east``, ``True``, the choice ``A``) are compared as text.

math-verify reads letters as factors: ``east`` and ``seat`` are the same product. So which references are words is decided
here, from the reference alone: one that consists of letters and has a word in it, or is a single capital letter, or is
``\text{...}`` as a whole. Formulas stay formulas: whatever has a digit, an operator or a command, what stands between
dollars (``$ab$`` is ``$ba$``), single small letters, products of x, y and z (``xy`` is ``yx``), and the names that
mathematics itself writes in letters (``pi``, ``sin x``).
"""

from __future__ import annotations

import re

# Names that LaTeX writes as commands, and what else is a word in formulas.
_COMMANDS = (
    "pi",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "arcsin",
    "arccos",
    "arctan",
    "sinh",
    "cosh",
    "tanh",
    "log",
    "ln",
)
_FORMULA_NAMES = {*_COMMANDS, "exp", "sqrt", "inf", "infty", "infinity", "mod", "and", "or"}
_BARE_COMMAND = re.compile(rf"(?<![\\A-Za-z])({'|'.join(_COMMANDS)})(?![A-Za-z])")
_TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox|rm|bf)\b"
)
_WHOLLY_TEXT = re.compile(rf"\$?\s*{_TEXT_COMMAND.pattern}\s*\{{([^{{}}]*)\}}\s*\$?")
_LETTERS = re.compile(r"[^\W\d_]+")
_WORDS = re.compile(r"[^\W\d_]+(?:[\s,;:.'\u2019\"&/()-]+[^\W\d_]+)*[.!?]?")
_CHOICE = re.compile(r"\(?([A-Z])\)?[.:]?")
_CHOICE_AND_ITS_TEXT = re.compile(r"(?:\(([a-z])\)|([a-z])[.:)])(?:\s.*)?")
_GAPS = re.compile(r"\\(?:[,;:! ]|quad\b|qquad\b|\\)|[~\s{}$]+")


def reference_in_words(reference: str) -> str | None:
    """The reference as ``comparable`` text if it is in words, None if it is a formula."""
    wholly_text = _WHOLLY_TEXT.fullmatch(reference.strip())
    text = (wholly_text[1] if wholly_text else reference).strip()
    if _CHOICE.fullmatch(text):
        return comparable(text)
    if not _WORDS.fullmatch(text) or (not wholly_text and all(map(_is_formula_name, _LETTERS.findall(text)))):
        return None
    return comparable(text)


def spell_commands(formula: str) -> str:
    """The formula with ``pi`` and ``sin`` written as the commands that they are; a product of letters otherwise."""
    return _BARE_COMMAND.sub(r"\\\1", formula)


def comparable(text: str) -> str:
    """The text without letter case, LaTeX around it, emphasis, gaps and the punctuation at its ends."""
    text = _GAPS.sub(" ", _TEXT_COMMAND.sub(" ", text)).replace("\u2019", "'")
    text = re.sub(r"\s*([,;])\s*", r"\1 ", " ".join(text.split())).strip(" .,;:!?\"'`*_").casefold()
    choice = _CHOICE.fullmatch(text.upper())
    return choice[1].casefold() if choice else text


def says(answer: str, reference: str) -> bool:
    """Whether an answer says what ``reference_in_words`` returned. A choice may be followed by what it stands for."""
    answer = comparable(answer)
    if answer == reference:
        return True
    choice = _CHOICE_AND_ITS_TEXT.fullmatch(answer)
    return choice is not None and reference == (choice[1] or choice[2])


def _is_formula_name(word: str) -> bool:
    symbol = len(word) == 1 and word < "\u0530"  # Latin, Greek, Cyrillic; other scripts write words of one character
    return symbol or word in _FORMULA_NAMES or set(word) <= set("xyz")
