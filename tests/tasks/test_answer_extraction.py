"""Each way of finding the answer in a response, and what happens when there is none."""

from __future__ import annotations

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.answer_extraction import extract_answer


@pytest.mark.parametrize(
    ("extraction", "response", "answer"),
    [
        ("none", "  4\n", "4"),
        ("last_line", "3 + 1\n= 4\n\n", "= 4"),
        ("last_line", " \n", None),
        ("last_number", "2 plus 2 is 4.", "4"),
        ("last_number", "it costs $1,234.50!", "1234.50"),
        ("last_number", "so x = -7", "-7"),
        ("last_number", "first 3, then 4", "4"),
        ("last_number", "no idea", None),
        ("boxed", r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1}, no: \boxed{2}", "2"),
        ("boxed", r"\boxed{1} and then \boxed{unfinished", "1"),
        ("boxed", "4", None),
        ("tag", "<answer>1</answer> hm <answer>\n2 </answer>", "2"),
        ("tag", "<answer>1", None),
    ],
)
def test_extraction(extraction: str, response: str, answer: str | None) -> None:
    assert extract_answer(response, extraction) == answer


def test_an_unknown_extraction_lists_the_known_ones() -> None:
    with pytest.raises(TaskError, match=r"'box' is unknown; choose one of none, last_line"):
        extract_answer("4", "box")
