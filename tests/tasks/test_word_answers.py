"""Which references are words, and which answers say the same words."""

from __future__ import annotations

import pytest

from megatron_dppo.tasks.word_answers import reference_in_words, says


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("east", "east"),
        ("East.", "east"),
        ("no solution", "no solution"),
        ("Monday,Tuesday", "monday, tuesday"),
        ("Smith's", "smith's"),
        ("\u4e1c", "\u4e1c"),  # Chinese: "east"
        ("AB", "ab"),
        ("A", "a"),
        ("(B)", "b"),
        (r"\textbf{(C)}", "c"),
        (r"\text{xy}", "xy"),
        (r"$\mathrm{east}$", "east"),
        # formulas
        ("x", None),
        ("xy", None),
        ("n, k", None),
        ("A, C", None),
        ("a and b", None),
        ("\u03c0", None),
        ("pi", None),
        ("sin x", None),
        ("infinity", None),
        ("$ab$", None),
        ("2ab", None),
        ("a+b", None),
        (r"\sqrt{x}", None),
        ("42", None),
        ("12 cm", None),
        (r"\text{12 cm}", None),
        ("(x, y)", None),
    ],
)
def test_the_reference_decides_what_is_in_words(reference: str, words: str | None) -> None:
    assert reference_in_words(reference) == words


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        (r"\text{ East }", "east", True),
        (r"\textbf{east}.", "east", True),
        ("**East**", "east", True),
        (r"no~\text{solution}", "no solution", True),
        (r"no\ \,solution", "no solution", True),
        ("Monday , Tuesday", "monday, tuesday", True),
        ("Tuesday, Monday", "monday, tuesday", False),
        ("Smith\u2019s", "smith's", True),
        ("seat", "east", False),
        ("eastern", "east", False),
        ("not east", "east", False),
        ("", "east", False),
        ("(a)", "a", True),
        (r"\text{A.}", "a", True),
        ("A) 12", "a", True),
        ("(A) because", "a", True),
        ("A man", "a", False),
        ("A or B", "a", False),
        ("(B) 12", "a", False),
    ],
)
def test_words_are_the_same_whatever_is_around_them(answer: str, reference: str, same: bool) -> None:
    assert says(answer, reference) is same
