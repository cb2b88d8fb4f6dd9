"""Each way of finding the answer in a response, and what happens when there is none."""

from __future__ import annotations

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.answer_extraction import ANSWER_EXTRACTIONS, extract_answer


@pytest.mark.parametrize(
    ("extraction", "response", "answer"),
    [
        ("none", "  4\n", "4"),
        ("last_line", "3 + 1\n= 4\n\n", "= 4"),
        ("last_line", " \n", None),
        ("last_line", "so\n**34**", "34"),
        ("last_line", "so\n`34`", "34"),
        ("last_line", "2 * 3 * 4", "2 * 3 * 4"),
        ("last_line", "*a* and *b*", "*a* and *b*"),
        ("last_line", "```\n34\n```", "34"),
        ("last_line", "34\n---\n", "34"),
        ("last_line", "$$\n34\n$$", "34"),
        ("last_line", "```", None),
        ("last_number", "2 plus 2 is 4.", "4"),
        ("last_number", "it costs $1,234.50!", "1234.50"),
        ("last_number", "so x = -7", "-7"),
        ("last_number", "first 3, then 4", "4"),
        ("last_number", "no idea", None),
        ("last_number", "12 cases\nAnswer:**\u221234**", "-34"),
        ("boxed", r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1}, no: \boxed{2}", "2"),
        ("boxed", r"\boxed{1} and then \boxed{unfinished", "1"),
        ("boxed", "4", None),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{(0, 1\}}", r"(0, 1\}"),  # escaped braces need no partner
        ("boxed", r"\boxed{1 \boxed{2}}", "2"),
        ("boxed", r"\boxed{1 \boxed{2", None),
        ("boxed", r"} \boxed {3} {", "3"),
        ("boxed", r"\boxed{}", ""),
        ("tag", "<answer>1</answer> hm <answer>\n2 </answer>", "2"),
        ("tag", "<answer>1", None),
        ("tag", "use <answer> tags: <answer>2</answer>", "2"),
        ("tag", "<answer>1</answer></answer>", "1"),
    ],
)
def test_extraction(extraction: str, response: str, answer: str | None) -> None:
    assert extract_answer(response, extraction) == answer


@pytest.mark.slow
@pytest.mark.parametrize("extraction", [name for name in ANSWER_EXTRACTIONS if name != "none"])
@pytest.mark.parametrize(
    "piece", ["\\boxed{", "\\boxed{\\frac{1", "}", "{", "\\", "<answer>", "</answer>", "*", "`", "\n", "```\n", "$$\n"]
)
def test_a_megabyte_of_openings_takes_one_pass(extraction: str, piece: str) -> None:
    """In quadratic time these would take minutes to hours, beyond the suite's time limit."""
    answers = {"boxed": "\\boxed{42}", "tag": "<answer>42</answer>", "last_line": "42\n", "last_number": "42 "}
    openings = piece * (1_000_000 // len(piece))
    says_nothing = piece[-1] in "*`\n"  # rules and fences
    last_of_piece = {"last_number": "1" if "1" in piece else "42", "last_line": "42" if says_nothing else openings}
    assert extract_answer(answers[extraction] + openings, extraction) == last_of_piece.get(extraction, "42")


def test_boxes_within_boxes_take_one_pass() -> None:
    depth = 100_000
    assert extract_answer("\\boxed{" * depth + "42" + "}" * depth, "boxed") == "42"
    assert extract_answer("\\boxed{" * depth, "boxed") is None
    assert extract_answer("<answer>" * depth, "tag") is None


def test_an_unknown_extraction_lists_the_known_ones() -> None:
    with pytest.raises(TaskError, match=r"'box' is unknown; choose one of none, last_line"):
        extract_answer("4", "box")
